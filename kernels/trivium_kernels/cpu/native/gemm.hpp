// Products of few or many rows with a packed weight.
//
// A panel is PANEL = 2 * VW output columns: for every k, their weights lie side by side, so that a product of one row reads
// the weight once from beginning to end. A tile of up to MAX_ROWS rows of x is multiplied with a panel in registers.
// Every sum goes over k in order, however many rows there are: a row has the same bits beside any others, and alone.

constexpr int PANEL = 2 * VW;
constexpr int MAX_ROWS = VW == 16 ? 12 : 6;  // 2 * MAX_ROWS sums fit into the registers

// Weights are asked for so long before they are used, if there are PREFETCHED_ROWS: with fewer the hardware does it as well,
// and one row is as fast as memory. Both, and to which cache, measured on Zen 4, from 0.5 to 32 KiB.
constexpr int BYTES_AHEAD = 8192;

template <int LOCALITY>
INLINE void prefetch_ahead(const void *p, int num_bytes) {
    for (int line = 0; line < num_bytes; line += 64)
        __builtin_prefetch(static_cast<const char *>(p) + BYTES_AHEAD + line, 0, LOCALITY);
}

static int64_t num_panels(int64_t n) { return (n + PANEL - 1) / PANEL; }

// How the weights of PANEL columns at one k are stored, and read as two vectors.
struct F32 {
    using Element = float;
    static constexpr int PREFETCHED_ROWS = 6, LOCALITY = 2;
    INLINE void load_weights(const Element *p, vf &left, vf &right) { left = load(p), right = load(p + VW); }
    INLINE void store_weight(Element *p, int column, float x) { p[column] = x; }
};

// bfloat16 is the upper half of a float. Column i lies in the lower half of 32 bits whose upper half is column VW + i, so
// that a shift and a mask are all it takes.
struct BF16 {
    using Element = uint16_t;
    static constexpr int PREFETCHED_ROWS = 3, LOCALITY = 3;
    INLINE void load_weights(const Element *p, vf &left, vf &right) {
        vi both;
        memcpy(&both, p, sizeof both);
        left = (vf)(both << 16), right = (vf)(both & int32_t(0xFFFF0000));
    }
    INLINE void store_weight(Element *p, int column, float x) { p[column % VW * 2 + column / VW] = round(x); }
    INLINE Element round(float x) {  // to nearest, ties to even
        uint32_t bits;
        memcpy(&bits, &x, sizeof bits);
        return Element((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
    }
};

#ifdef HAS_F16
struct F16 {
    using Element = uint16_t;
    static constexpr int PREFETCHED_ROWS = 3, LOCALITY = 3;
    INLINE void load_weights(const Element *p, vf &left, vf &right) { left = from_f16(p), right = from_f16(p + VW); }
    INLINE void store_weight(Element *p, int column, float x) { p[column] = to_f16(x); }
};
#endif

// Sums of a tile, on their way out of the registers: what `finish` calls would push them there one by one.
template <int ROWS>
struct Sums {
    float rows[ROWS][PANEL];

    INLINE_MEMBER void put(int row, vf left, vf right) { store(rows[row], left), store(rows[row] + VW, right); }
};

// Add bias and residual to the sums of a tile, and write them to y.
template <int ROWS>
static void finish(const Gemm &g, int64_t row, int64_t column, const Sums<ROWS> &sums) {
    const int64_t left = g.n - column, width = left < PANEL ? left : PANEL;
    for (int r = 0; r < ROWS; r++) {
        float *y = g.y + (row + r) * g.y_stride + column;
        const float *from = sums.rows[r], *bias = g.bias ? g.bias + column : nullptr;
        const float *add = g.add ? g.add + (row + r) * g.add_stride + column : nullptr;
        if (width == PANEL) {
            for (int c = 0; c < PANEL; c += VW) {
                vf value = load(from + c);
                if (bias) value += load(bias + c);
                if (add) value += load(add + c);
                store(y + c, value);
            }
        } else {
            for (int64_t c = 0; c < width; c++) y[c] = from[c] + (bias ? bias[c] : 0.0f) + (add ? add[c] : 0.0f);
        }
    }
}

// Rows are written out by fold expressions: compilers keep an array in registers if all its indices are constants.
template <class W, int... ROWS>
INLINE void multiply_rows(
    const Gemm &g, const typename W::Element *panel, int64_t row, int64_t column, std::integer_sequence<int, ROWS...>) {
    constexpr int NUM_ROWS = sizeof...(ROWS);
    const float *x = g.x + row * g.x_stride;
    const int64_t stride = g.x_stride;
    vf left[NUM_ROWS] = {}, right[NUM_ROWS] = {};
    for (int64_t k = 0; k < g.k; k++) {
        const typename W::Element *p = panel + k * PANEL;
        vf w0, w1, a;
        if constexpr (NUM_ROWS >= W::PREFETCHED_ROWS) prefetch_ahead<W::LOCALITY>(p, PANEL * sizeof(*p));
        W::load_weights(p, w0, w1);
        ((a = splat(x[ROWS * stride + k]), left[ROWS] += a * w0, right[ROWS] += a * w1), ...);
    }
    Sums<NUM_ROWS> sums;
    (sums.put(ROWS, left[ROWS], right[ROWS]), ...);
    finish(g, row, column, sums);
}

template <class W, int NUM_ROWS>
static void multiply_tile(const Gemm &g, const typename W::Element *panel, int64_t row, int64_t column) {
    multiply_rows<W>(g, panel, row, column, std::make_integer_sequence<int, NUM_ROWS>());
}

template <class W>
struct Tiles {
    using Tile = void (*)(const Gemm &, const typename W::Element *, int64_t, int64_t);
    Tile of[MAX_ROWS + 1];
    template <int ROWS>
    constexpr void fill() {
        of[ROWS] = multiply_tile<W, ROWS>;
        if constexpr (ROWS > 1) fill<ROWS - 1>();
    }
    constexpr Tiles() : of() { fill<MAX_ROWS>(); }
};

template <class W>
static void multiply_panels(const void *arg, int64_t begin, int64_t end) {
    static constexpr Tiles<W> tiles;
    const Gemm &g = *static_cast<const Gemm *>(arg);
    const auto *panels = static_cast<const typename W::Element *>(g.panels);
    const int64_t num_tiles = (g.m + MAX_ROWS - 1) / MAX_ROWS;
    for (int64_t panel = begin; panel < end; panel++) {
        for (int64_t t = 0; t < num_tiles; t++) {
            int64_t row = g.m * t / num_tiles, next = g.m * (t + 1) / num_tiles;
            tiles.of[next - row](g, panels + panel * g.k * PANEL, row, panel * PANEL);
        }
    }
}

struct Packing {
    const float *w;
    int64_t n, k;
    void *panels;
};

template <class W>
static void pack_panels(const void *arg, int64_t begin, int64_t end) {
    const Packing &p = *static_cast<const Packing *>(arg);
    for (int64_t panel = begin; panel < end; panel++) {
        auto *out = static_cast<typename W::Element *>(p.panels) + panel * p.k * PANEL;
        for (int64_t first = 0; first < p.k; first += 16) {  // few columns at a time, so that all rows stay in the cache
            int64_t end = first + 16 < p.k ? first + 16 : p.k;
            for (int c = 0; c < PANEL; c++) {
                int64_t column = panel * PANEL + c;
                const float *w = p.w + column * p.k;
                for (int64_t k = first; k < end; k++) W::store_weight(out + k * PANEL, c, column < p.n ? w[k] : 0.0f);
            }
        }
    }
}

#ifdef HAS_INT8
#include "gemm_int8.hpp"
#endif
#ifdef HAS_BF16_PAIRS
#include "gemm_bf16.hpp"
#endif

static int64_t packed_bytes(WeightType type, int64_t n, int64_t k) {
#ifdef HAS_INT8
    if (type == WEIGHT_INT8) return num_panels(n) * int8_panel_bytes(k);
#endif
#ifdef HAS_BF16_PAIRS
    if (type == WEIGHT_BF16_PAIRS) return num_panels(n) * PANEL * pairs_depth(k) * 2;
#endif
    return num_panels(n) * PANEL * k * (type == WEIGHT_F32 ? 4 : 2);
}

static void pack(WeightType type, const float *w, int64_t n, int64_t k, void *panels, int num_threads) {
    Packing p = {w, n, k, panels};
    PoolTask task = pack_panels<F32>;
    if (type == WEIGHT_BF16) task = pack_panels<BF16>;
#ifdef HAS_F16
    if (type == WEIGHT_F16) task = pack_panels<F16>;
#endif
#ifdef HAS_INT8
    if (type == WEIGHT_INT8) task = pack_int8_panels;
#endif
#ifdef HAS_BF16_PAIRS
    if (type == WEIGHT_BF16_PAIRS) task = pack_pairs;
#endif
    pool_run(task, &p, num_panels(n), 1, num_threads);
}

static void multiply(const Gemm &g, int num_threads) {
    int64_t count = num_panels(g.n), grain = count / (8 * num_threads);
    grain = grain > 1 ? grain : 1;
    PoolTask task = multiply_panels<F32>;
    if (g.type == WEIGHT_BF16) task = multiply_panels<BF16>;
#ifdef HAS_F16
    if (g.type == WEIGHT_F16) task = multiply_panels<F16>;
#endif
#ifdef HAS_INT8
    if (g.type == WEIGHT_INT8) return multiply_int8(g, grain, num_threads);
#endif
#ifdef HAS_BF16_PAIRS
    if (g.type == WEIGHT_BF16_PAIRS) return multiply_pairs(g, grain, num_threads);
#endif
    pool_run(task, &g, count, grain, num_threads);
}
