// Norms, activations, rotary embeddings, cache writes and masks: one row after the other, each read and written once.

static void rms_norm_rows(const void *arg, int64_t begin, int64_t end) {
    const NormRows &job = *static_cast<const NormRows *>(arg);
    const int64_t width = job.width, whole = width / VW * VW;
    for (int64_t i = begin; i < end; i++) {
        const float *x = job.x + i / job.inner * job.outer_stride + i % job.inner * job.inner_stride;
        float *y = job.y + i * width;
        vf squares = {};
        for (int64_t c = 0; c < whole; c += VW) squares += load(x + c) * load(x + c);
        if (whole < width) squares += load_some(x + whole, width - whole) * load_some(x + whole, width - whole);
        vf scale = splat(1.0f / sqrtf(sum_of(squares) / float(width) + job.eps));
        for (int64_t c = 0; c < whole; c += VW) store(y + c, load(x + c) * scale * load(job.weight + c));
        if (whole < width) {
            int64_t rest = width - whole;
            store_some(y + whole, load_some(x + whole, rest) * scale * load_some(job.weight + whole, rest), rest);
        }
    }
}

static void layer_norm_rows(const void *arg, int64_t begin, int64_t end) {
    const NormRows &job = *static_cast<const NormRows *>(arg);
    const int64_t width = job.width, whole = width / VW * VW, rest = width - whole;
    for (int64_t i = begin; i < end; i++) {
        const float *x = job.x + i / job.inner * job.outer_stride + i % job.inner * job.inner_stride;
        float *y = job.y + i * width;
        vf sums = {};
        for (int64_t c = 0; c < whole; c += VW) sums += load(x + c);
        if (rest) sums += load_some(x + whole, rest);
        vf mean = splat(sum_of(sums) / float(width)), squares = {};
        for (int64_t c = 0; c < whole; c += VW) squares += (load(x + c) - mean) * (load(x + c) - mean);
        float total = sum_of(squares);
        for (int64_t c = whole; c < width; c++) total += (x[c] - mean[0]) * (x[c] - mean[0]);
        vf scale = splat(1.0f / sqrtf(total / float(width) + job.eps));
        for (int64_t c = 0; c < whole; c += VW)
            store(y + c, (load(x + c) - mean) * scale * load(job.weight + c) + load(job.bias + c));
        if (rest) {
            vf normed = (load_some(x + whole, rest) - mean) * scale * load_some(job.weight + whole, rest);
            store_some(y + whole, normed + load_some(job.bias + whole, rest), rest);
        }
    }
}

static void norm(const NormRows &job, int num_threads) {
    PoolTask task = job.bias ? layer_norm_rows : rms_norm_rows;
    pool_run(task, &job, job.rows, ROWS_WORTH(job.width), num_threads);
}

// ---- activations ----

INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + vexp(-x)); }

template <int KIND>
INLINE vf activated(vf x) {
    if (KIND == ACTIVATION_RELU) return vmax(x, vf{});
    if (KIND == ACTIVATION_SILU) return x * sigmoid(x);
    if (KIND == ACTIVATION_GELU_TANH) {
        vf inner = (x + x * x * x * 0.044715f) * 0.79788456f;
        return 0.5f * x * (1.0f + vtanh(inner));
    }
    if (KIND == ACTIVATION_GELU) return 0.5f * x * (1.0f + verf(x * 0.70710678f));
    return x;
}

template <int KIND>
static void activate_rows(const void *arg, int64_t begin, int64_t end) {
    const ActivateRows &job = *static_cast<const ActivateRows *>(arg);
    const int64_t width = job.width, whole = width / VW * VW, rest = width - whole;
    for (int64_t i = begin; i < end; i++) {
        const float *x = job.x + i * job.x_stride, *up = x + width;
        float *y = job.y + i * width;
        for (int64_t c = 0; c < whole; c += VW) {
            vf value = activated<KIND>(load(x + c));
            store(y + c, job.is_gated ? value * load(up + c) : value);
        }
        if (rest) {
            vf value = activated<KIND>(load_some(x + whole, rest));
            store_some(y + whole, job.is_gated ? value * load_some(up + whole, rest) : value, rest);
        }
    }
}

static void activate(const ActivateRows &job, int num_threads) {
    static constexpr PoolTask tasks[NUM_ACTIVATIONS] = {
        activate_rows<ACTIVATION_RELU>, activate_rows<ACTIVATION_SILU>, activate_rows<ACTIVATION_GELU_TANH>,
        activate_rows<ACTIVATION_GELU>};
    pool_run(tasks[job.kind], &job, job.rows, ROWS_WORTH(4 * job.width), num_threads);
}

// ---- rotary embedding and the cache ----

// y = scale * weight * x with its first rotary_dim elements rotated; weight may be null. y may not be x.
INLINE void rotate_head(
    float *y, const float *x, const float *weight, float scale, const float *cosine, const float *sine, int64_t rotary_dim,
    int64_t head_dim) {
    const int64_t half = rotary_dim / 2;
    int64_t c = 0;
    for (; c + VW <= half; c += VW) {
        vf low = load(x + c) * scale, high = load(x + half + c) * scale;
        if (weight) low *= load(weight + c), high *= load(weight + half + c);
        store(y + c, low * load(cosine + c) + high * load(sine + c));
        store(y + half + c, high * load(cosine + half + c) + low * load(sine + half + c));
    }
    for (; c < half; c++) {
        float low = x[c] * scale, high = x[half + c] * scale;
        if (weight) low *= weight[c], high *= weight[half + c];
        y[c] = low * cosine[c] + high * sine[c];
        y[half + c] = high * cosine[half + c] + low * sine[half + c];
    }
    for (c = rotary_dim; c < head_dim; c++) y[c] = x[c] * scale * (weight ? weight[c] : 1.0f);
}

INLINE float norm_scale(const float *x, int64_t width, float eps) {
    vf squares = {};
    int64_t c = 0;
    for (; c + VW <= width; c += VW) squares += load(x + c) * load(x + c);
    float total = sum_of(squares);
    for (; c < width; c++) total += x[c] * x[c];
    return 1.0f / sqrtf(total / float(width) + eps);
}

static void rotate_tokens(const void *arg, int64_t begin, int64_t end) {
    const RotateHeads &job = *static_cast<const RotateHeads *>(arg);
    for (int64_t t = begin; t < end; t++) {
        const float *cosine = job.cosine + t * job.rotary_dim, *sine = job.sine + t * job.rotary_dim;
        const float *x = job.x + t * job.token_stride;
        float *y = job.y + t * job.num_heads * job.head_dim;
        for (int64_t h = 0; h < job.num_heads; h++, x += job.head_dim, y += job.head_dim)
            rotate_head(y, x, nullptr, 1.0f, cosine, sine, job.rotary_dim, job.head_dim);
    }
}

static void rotate(const RotateHeads &job, int num_threads) {
    pool_run(rotate_tokens, &job, job.num_tokens, ROWS_WORTH(job.num_heads * job.head_dim), num_threads);
}

INLINE int64_t place_of(int64_t slot, int64_t block_size, int64_t block_stride, int64_t row_width) {
    return slot / block_size * block_stride + slot % block_size * row_width;
}

static void write_tokens(const void *arg, int64_t begin, int64_t end) {
    const CacheWrite &job = *static_cast<const CacheWrite *>(arg);
    const auto bytes = size_t(job.row_width) * sizeof(float);
    for (int64_t t = begin; t < end; t++) {
        if (job.slots[t] < 0) continue;
        int64_t place = place_of(job.slots[t], job.block_size, job.block_stride, job.row_width);
        memcpy(job.key_cache + place, job.key + t * job.key_stride, bytes);
        memcpy(job.value_cache + place, job.value + t * job.value_stride, bytes);
    }
}

static void write_cache(const CacheWrite &job, int num_threads) {
    pool_run(write_tokens, &job, job.num_tokens, ROWS_WORTH(2 * job.row_width), num_threads);
}

static void rotate_and_cache_tokens(const void *arg, int64_t begin, int64_t end) {
    const RotateAndCache &job = *static_cast<const RotateAndCache *>(arg);
    const int64_t dim = job.head_dim, row_width = job.num_kv_heads * dim;
    for (int64_t t = begin; t < end; t++) {
        const float *cosine = job.cosine + t * job.rotary_dim, *sine = job.sine + t * job.rotary_dim;
        const float *x = job.qkv + t * job.token_stride;
        float *y = job.queries + t * job.num_heads * dim;
        for (int64_t h = 0; h < job.num_heads; h++, x += dim, y += dim) {
            float scale = job.query_norm ? norm_scale(x, dim, job.eps) : 1.0f;
            rotate_head(y, x, job.query_norm, scale, cosine, sine, job.rotary_dim, dim);
        }
        if (job.slots[t] < 0) continue;
        int64_t place = place_of(job.slots[t], job.block_size, job.block_stride, row_width);
        for (int64_t h = 0; h < job.num_kv_heads; h++, x += dim) {
            float scale = job.key_norm ? norm_scale(x, dim, job.eps) : 1.0f;
            rotate_head(job.key_cache + place + h * dim, x, job.key_norm, scale, cosine, sine, job.rotary_dim, dim);
        }
        memcpy(job.value_cache + place, x, size_t(row_width) * sizeof(float));
    }
}

static void rotate_and_cache(const RotateAndCache &job, int num_threads) {
    const int64_t width = (job.num_heads + 2 * job.num_kv_heads) * job.head_dim;
    pool_run(rotate_and_cache_tokens, &job, job.num_tokens, ROWS_WORTH(width), num_threads);
}

// ---- masks of tokens ----

static void mask_rows(const void *arg, int64_t begin, int64_t end) {
    const TokenBitmask &job = *static_cast<const TokenBitmask *>(arg);
    constexpr int64_t BITS = 32;
    const int64_t whole = job.vocab_size / BITS * BITS;
    vi lane_bits;
    for (int lane = 0; lane < VW; lane++) lane_bits[lane] = 1 << lane;
    const vf banned = splat(-INFINITY);
    for (int64_t i = begin; i < end; i++) {
        float *row = job.logits + job.rows[i] * job.logits_stride;
        const uint32_t *words = job.bitmask + i * job.bitmask_stride;
        for (int64_t token = 0; token < whole; token += BITS) {
            const uint32_t word = words[token / BITS];
            if (word == ~uint32_t(0)) continue;
            for (int part = 0; part < BITS; part += VW) {
                float *some = row + token + part;
                const vi bits = (vi{} + int32_t(word >> part)) & lane_bits;
                store(some, bits == 0 ? banned : load(some));
            }
        }
        for (int64_t token = whole; token < job.vocab_size; token++)
            if (!(words[whole / BITS] >> (token - whole) & 1)) row[token] = -INFINITY;
    }
}

static void apply_token_bitmask(const TokenBitmask &job, int num_threads) {
    pool_run(mask_rows, &job, job.num_masks, ROWS_WORTH(job.vocab_size), num_threads);
}
