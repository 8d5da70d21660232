// What module.cpp calls: one table of kernels for each instruction set that was compiled in.
#pragma once

#include <cstdint>

// How the weights of a product are stored, packed in panels of output columns (gemm.hpp).
enum WeightType { WEIGHT_F32, WEIGHT_BF16, WEIGHT_F16, WEIGHT_INT8, WEIGHT_BF16_PAIRS, NUM_WEIGHT_TYPES };

// y[m][n] = x[m][k] w[n][k] + bias[n] + add[m][n]; bias and add may be null. Strides are in floats.
struct Gemm {
    const float *x;
    const void *panels;
    const float *bias, *add;
    float *y;
    int64_t m, n, k, x_stride, y_stride, add_stride;
    WeightType type;
};

// Norms of `rows` rows: row i of x begins at i / inner * outer_stride + i % inner * inner_stride; y is contiguous.
// With a bias it is LayerNorm, without one RMSNorm.
struct NormRows {
    const float *x, *weight, *bias;
    float *y, eps;
    int64_t rows, inner, outer_stride, inner_stride, width;
};

enum ActivationKind { ACTIVATION_RELU, ACTIVATION_SILU, ACTIVATION_GELU_TANH, ACTIVATION_GELU, NUM_ACTIVATIONS };

// y[width] = act(x[width]), or act(x[width]) times the next `width` of x. y may be x if that is not gated.
struct ActivateRows {
    const float *x;
    float *y;
    int64_t rows, width, x_stride;
    ActivationKind kind;
    bool is_gated;
};

// y = x with the first rotary_dim of each head rotated. cosine, sine: [num_tokens][rotary_dim], sine with its sign.
struct RotateHeads {
    const float *x, *cosine, *sine;
    float *y;
    int64_t num_tokens, num_heads, head_dim, rotary_dim, token_stride;
};

// A token's key and value go to its slot of the caches; nowhere if that is negative.
struct CacheWrite {
    const float *key, *value;
    float *key_cache, *value_cache;
    const int64_t *slots;
    int64_t num_tokens, row_width, key_stride, value_stride, block_size, block_stride;
};

// Of every token's heads [queries, keys, values]: queries and keys normed, if there are weights, and rotated; queries go to
// `queries`, keys and values to the caches.
struct RotateAndCache {
    const float *qkv, *cosine, *sine, *query_norm, *key_norm;
    float *queries, *key_cache, *value_cache;
    const int64_t *slots;
    int64_t num_tokens, num_heads, num_kv_heads, head_dim, rotary_dim, token_stride, block_size, block_stride;
    float eps;
};

// Row rows[i] of `logits` becomes -inf where the bit of a token in row i of `bitmask` is 0. Strides are in floats and words.
struct TokenBitmask {
    float *logits;
    const uint32_t *bitmask;
    const int64_t *rows;
    int64_t num_masks, vocab_size, logits_stride, bitmask_stride;
};

// Tokens [begin, end) are the last queries of a sequence with `context` keys, whose blocks are in row `row` of the tables.
struct Segment {
    int64_t begin, end, row, context;
};

// tables null: the keys of a segment are its own tokens, side by side. bias: [num_heads][2 * max_distance + 1] or null.
struct Attention {
    const float *query, *keys, *values, *bias;
    float *output;
    const int32_t *tables;
    const Segment *segments;
    int64_t num_segments, num_heads, num_kv_heads, head_dim, query_stride, token_stride;
    int64_t table_stride, block_size, block_stride, window, max_distance;
    float scale, soft_cap;
    bool is_causal;
};

struct Kernels {
    const char *name;
    bool supports[NUM_WEIGHT_TYPES];
    // bytes of a packed weight [n][k]
    int64_t (*packed_bytes)(WeightType type, int64_t n, int64_t k);
    // w [n][k] float32 -> panels
    void (*pack)(WeightType type, const float *w, int64_t n, int64_t k, void *panels, int num_threads);
    void (*gemm)(const Gemm &g, int num_threads);
    void (*norm)(const NormRows &job, int num_threads);
    void (*activate)(const ActivateRows &job, int num_threads);
    void (*rotate)(const RotateHeads &job, int num_threads);
    void (*write_cache)(const CacheWrite &job, int num_threads);
    void (*rotate_and_cache)(const RotateAndCache &job, int num_threads);
    void (*apply_token_bitmask)(const TokenBitmask &job, int num_threads);
    void (*attend)(const Attention &a, int num_threads);
};

extern const Kernels kernels_base;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif
