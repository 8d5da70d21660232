// Products in 8-bit integers: weights with a scale for each output column, rows of x quantized on the way, each with its own
// scale. Sums are exact in 32 bits.
//
// A panel holds 4 consecutive k of each of its columns side by side, then the sum of every column (32-bit) and its scale.
// DotBytes (isa_*.cpp) says how four bytes are multiplied: with x as x + 128, unsigned, or as it is.

constexpr int INT8_MAX_ROWS = VW == 16 ? 12 : 4;

static int64_t int8_depth(int64_t k) { return (k + 3) / 4 * 4; }

static int64_t int8_panel_bytes(int64_t k) { return (int8_depth(k) + 8) * PANEL; }

struct Int8Gemm {
    const Gemm *g;
    uint8_t *rows;  // [m][int8_depth(k)]
    float *row_scales;
};

// Round x / scale to nearest; the rest of the row is zeros.
static void quantize_rows(const void *arg, int64_t begin, int64_t end) {
    const Int8Gemm &job = *static_cast<const Int8Gemm *>(arg);
    int64_t k = job.g->k, depth = int8_depth(k);
    for (int64_t m = begin; m < end; m++) {
        const float *x = job.g->x + m * job.g->x_stride;
        uint8_t *out = job.rows + m * depth;
        vf most = {};
        int64_t i = 0;
        for (; i + VW <= k; i += VW) most = vmax(most, vmax(load(x + i), -load(x + i)));
        if (i < k) most = vmax(most, vmax(load_some(x + i, k - i), -load_some(x + i, k - i)));
        float largest = max_of(most), inverse = largest > 0 ? 127.0f / largest : 0.0f;
        job.row_scales[m] = largest / 127.0f;
        for (i = 0; i < depth; i += VW) {
            vf scaled = (i + VW <= k ? load(x + i) : load_some(x + i, k > i ? k - i : 0)) * inverse;
            vi rounded = (vi)(scaled + 12582912.0f) - 0x4B400000 + DotBytes::OFFSET;
            uint8_t bytes[VW];
            for (int lane = 0; lane < VW; lane++) bytes[lane] = uint8_t(rounded[lane]);
            memcpy(out + i, bytes, size_t(depth - i < VW ? depth - i : VW));
        }
    }
}

template <int... ROWS>
INLINE void multiply_int8_rows(
    const Int8Gemm &job, const int8_t *panel, int64_t row, int64_t column, std::integer_sequence<int, ROWS...>) {
    const Gemm &g = *job.g;
    const int64_t depth = int8_depth(g.k);
    const uint8_t *x = job.rows + row * depth;
    vi left[sizeof...(ROWS)] = {}, right[sizeof...(ROWS)] = {};
    for (int64_t k = 0; k < depth; k += 4) {
        const DotBytes w0 = DotBytes::of(panel + k * PANEL), w1 = DotBytes::of(panel + k * PANEL + 4 * VW);
        int32_t four;
        ((memcpy(&four, x + ROWS * depth + k, sizeof four), left[ROWS] = DotBytes::add_products(left[ROWS], w0, four),
          right[ROWS] = DotBytes::add_products(right[ROWS], w1, four)),
         ...);
    }
    const auto *column_sums = reinterpret_cast<const int32_t *>(panel + depth * PANEL);
    const auto *scales = reinterpret_cast<const float *>(column_sums + PANEL);
    vi sums0, sums1;
    memcpy(&sums0, column_sums, sizeof sums0), memcpy(&sums1, column_sums + VW, sizeof sums1);
    sums0 *= DotBytes::OFFSET, sums1 *= DotBytes::OFFSET;
    const vf scales0 = load(scales), scales1 = load(scales + VW);
    Sums<sizeof...(ROWS)> sums;
    (sums.put(ROWS, to_floats(left[ROWS] - sums0) * (scales0 * job.row_scales[row + ROWS]),
              to_floats(right[ROWS] - sums1) * (scales1 * job.row_scales[row + ROWS])),
     ...);
    finish(g, row, column, sums);
}

template <int NUM_ROWS>
static void multiply_int8_tile(const Int8Gemm &job, const int8_t *panel, int64_t row, int64_t column) {
    multiply_int8_rows(job, panel, row, column, std::make_integer_sequence<int, NUM_ROWS>());
}

struct Int8Tiles {
    using Tile = void (*)(const Int8Gemm &, const int8_t *, int64_t, int64_t);
    Tile of[INT8_MAX_ROWS + 1];
    template <int ROWS>
    constexpr void fill() {
        of[ROWS] = multiply_int8_tile<ROWS>;
        if constexpr (ROWS > 1) fill<ROWS - 1>();
    }
    constexpr Int8Tiles() : of() { fill<INT8_MAX_ROWS>(); }
};

static void multiply_int8_panels(const void *arg, int64_t begin, int64_t end) {
    static constexpr Int8Tiles tiles;
    const Int8Gemm &job = *static_cast<const Int8Gemm *>(arg);
    const Gemm &g = *job.g;
    int64_t num_tiles = (g.m + INT8_MAX_ROWS - 1) / INT8_MAX_ROWS;
    for (int64_t panel = begin; panel < end; panel++) {
        const auto *weights = static_cast<const int8_t *>(g.panels) + panel * int8_panel_bytes(g.k);
        for (int64_t t = 0; t < num_tiles; t++) {
            int64_t row = g.m * t / num_tiles, next = g.m * (t + 1) / num_tiles;
            tiles.of[next - row](job, weights, row, panel * PANEL);
        }
    }
}

static void pack_int8_panels(const void *arg, int64_t begin, int64_t end) {
    const Packing &p = *static_cast<const Packing *>(arg);
    int64_t depth = int8_depth(p.k);
    for (int64_t panel = begin; panel < end; panel++) {
        auto *out = static_cast<int8_t *>(p.panels) + panel * int8_panel_bytes(p.k);
        auto *column_sums = reinterpret_cast<int32_t *>(out + depth * PANEL);
        auto *scales = reinterpret_cast<float *>(column_sums + PANEL);
        memset(out, 0, size_t(int8_panel_bytes(p.k)));
        for (int c = 0; c < PANEL && panel * PANEL + c < p.n; c++) {
            const float *w = p.w + (panel * PANEL + c) * p.k;
            float largest = 0;
            for (int64_t k = 0; k < p.k; k++) largest = fabsf(w[k]) > largest ? fabsf(w[k]) : largest;
            float inverse = largest > 0 ? 127.0f / largest : 0.0f;
            scales[c] = largest / 127.0f;
            for (int64_t k = 0; k < p.k; k++) {
                auto value = int8_t(lrintf(w[k] * inverse));
                column_sums[c] += value;
                out[(k / 4 * PANEL + c) * 4 + k % 4] = value;
            }
        }
    }
}

static void multiply_int8(const Gemm &g, int64_t grain, int num_threads) {
    static thread_local Buffer<uint8_t> rows;
    static thread_local Buffer<float> scales;
    Int8Gemm job = {&g, rows.of(g.m * int8_depth(g.k)), scales.of(g.m)};
    pool_run(quantize_rows, &job, g.m, 16, num_threads);
    pool_run(multiply_int8_panels, &job, num_panels(g.n), grain, num_threads);
}
