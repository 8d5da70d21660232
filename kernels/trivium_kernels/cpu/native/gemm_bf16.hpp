// Products in bfloat16: weights and rows of x rounded to it, sums in float32.
//
// A panel holds two consecutive k of each of its columns side by side. DotPairs (isa_*.cpp) adds the two products of a pair
// to the sum of a column; functions with PAIRS_TARGET may use its instructions.

static int64_t pairs_depth(int64_t k) { return (k + 1) / 2 * 2; }

struct PairsGemm {
    const Gemm *g;
    uint16_t *rows;  // [m][pairs_depth(k)]
};

// Round to nearest, ties to even; what fills up the last pair is 0.
PAIRS_TARGET static void round_rows(const void *arg, int64_t begin, int64_t end) {
    const PairsGemm &job = *static_cast<const PairsGemm *>(arg);
    const int64_t k = job.g->k, depth = pairs_depth(k);
    for (int64_t m = begin; m < end; m++) {
        const float *x = job.g->x + m * job.g->x_stride;
        uint16_t *out = job.rows + m * depth;
        for (int64_t i = 0; i < depth; i += VW) {
            uint16_t rounded[VW];
            DotPairs::round(i + VW <= k ? load(x + i) : load_some(x + i, k - i), rounded);
            memcpy(out + i, rounded, size_t(depth - i < VW ? depth - i : VW) * sizeof *out);
        }
    }
}

template <int... ROWS>
PAIRS_TARGET INLINE void multiply_pairs_rows(
    const PairsGemm &job, const uint16_t *panel, int64_t row, int64_t column, std::integer_sequence<int, ROWS...>) {
    constexpr int NUM_ROWS = sizeof...(ROWS);
    const int64_t depth = pairs_depth(job.g->k);
    const uint16_t *x = job.rows + row * depth;
    vf left[NUM_ROWS] = {}, right[NUM_ROWS] = {};
    for (int64_t k = 0; k < depth; k += 2) {
        const uint16_t *p = panel + k * PANEL;
        if constexpr (NUM_ROWS >= F32::PREFETCHED_ROWS) prefetch_ahead<F32::LOCALITY>(p, 2 * PANEL * sizeof *p);
        const DotPairs w0 = DotPairs::of(p), w1 = DotPairs::of(p + 2 * VW);
        int32_t pair;
        ((memcpy(&pair, x + ROWS * depth + k, sizeof pair), left[ROWS] = DotPairs::add_products(left[ROWS], w0, pair),
          right[ROWS] = DotPairs::add_products(right[ROWS], w1, pair)),
         ...);
    }
    Sums<NUM_ROWS> sums;
    (sums.put(ROWS, left[ROWS], right[ROWS]), ...);
    finish(*job.g, row, column, sums);
}

template <int NUM_ROWS>
PAIRS_TARGET static void multiply_pairs_tile(const PairsGemm &job, const uint16_t *panel, int64_t row, int64_t column) {
    multiply_pairs_rows(job, panel, row, column, std::make_integer_sequence<int, NUM_ROWS>());
}

struct PairsTiles {
    using Tile = void (*)(const PairsGemm &, const uint16_t *, int64_t, int64_t);
    Tile of[MAX_ROWS + 1];
    template <int ROWS>
    constexpr void fill() {
        of[ROWS] = multiply_pairs_tile<ROWS>;
        if constexpr (ROWS > 1) fill<ROWS - 1>();
    }
    constexpr PairsTiles() : of() { fill<MAX_ROWS>(); }
};

static void multiply_pairs_panels(const void *arg, int64_t begin, int64_t end) {
    static constexpr PairsTiles tiles;
    const PairsGemm &job = *static_cast<const PairsGemm *>(arg);
    const Gemm &g = *job.g;
    const auto *panels = static_cast<const uint16_t *>(g.panels);
    const int64_t num_tiles = (g.m + MAX_ROWS - 1) / MAX_ROWS;
    for (int64_t panel = begin; panel < end; panel++) {
        for (int64_t t = 0; t < num_tiles; t++) {
            int64_t row = g.m * t / num_tiles, next = g.m * (t + 1) / num_tiles;
            tiles.of[next - row](job, panels + panel * pairs_depth(g.k) * PANEL, row, panel * PANEL);
        }
    }
}

static void pack_pairs(const void *arg, int64_t begin, int64_t end) {
    const Packing &p = *static_cast<const Packing *>(arg);
    const int64_t depth = pairs_depth(p.k);
    for (int64_t panel = begin; panel < end; panel++) {
        auto *out = static_cast<uint16_t *>(p.panels) + panel * depth * PANEL;
        for (int c = 0; c < PANEL; c++) {
            const int64_t column = panel * PANEL + c;
            for (int64_t k = 0; k < depth; k++)
                out[(k / 2 * PANEL + c) * 2 + k % 2] = column < p.n && k < p.k ? BF16::round(p.w[column * p.k + k]) : 0;
        }
    }
}

static void multiply_pairs(const Gemm &g, int64_t grain, int num_threads) {
    static thread_local Buffer<uint16_t> rows;
    PairsGemm job = {&g, rows.of(g.m * pairs_depth(g.k))};
    pool_run(round_rows, &job, g.m, 16, num_threads);
    pool_run(multiply_pairs_panels, &job, num_panels(g.n), grain, num_threads);
}
