// Vectors of floats as wide as the processor has them, by the vector extensions of GCC and Clang.
//
// Included once for each instruction set (isa_*.cpp), inside its namespace: VW is the number of floats in a vector.

typedef float vf __attribute__((vector_size(4 * VW)));
typedef int32_t vi __attribute__((vector_size(4 * VW)));

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))

INLINE vf load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }

INLINE vf splat(float x) { return x - vf{}; }

INLINE vf to_floats(vi v) { return __builtin_convertvector(v, vf); }

INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }

INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }

typedef float four __attribute__((vector_size(16)));

INLINE float sum_of(vf v) {
    four lanes[VW / 4];
    memcpy(lanes, &v, sizeof v);
    four total = lanes[0];
#pragma GCC unroll 4
    for (int i = 1; i < VW / 4; i++) total += lanes[i];
    return (total[0] + total[2]) + (total[1] + total[3]);
}

INLINE float max_of(vf v) {
    four lanes[VW / 4];
    memcpy(lanes, &v, sizeof v);
    four most = lanes[0];
#pragma GCC unroll 4
    for (int i = 1; i < VW / 4; i++) most = lanes[i] > most ? lanes[i] : most;
    float a = most[0] > most[2] ? most[0] : most[2], b = most[1] > most[3] ? most[1] : most[3];
    return a > b ? a : b;
}

// The first `count` floats of p, then zeros.
INLINE vf load_some(const float *p, int64_t count) {
    float lanes[VW] = {};
    memcpy(lanes, p, size_t(count) * sizeof(float));
    return load(lanes);
}

INLINE void store_some(float *p, vf v, int64_t count) {
    float lanes[VW];
    store(lanes, v);
    memcpy(p, lanes, size_t(count) * sizeof(float));
}

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})
#endif

template <int... LANES>
struct Lanes {};
template <int COUNT, int... LANES>
struct FirstLanes : FirstLanes<COUNT - 1, COUNT - 1, LANES...> {};
template <int... LANES>
struct FirstLanes<0, LANES...> {
    using Type = Lanes<LANES...>;
};

// Lane i of a and b, whose lanes stand STRIDE apart: a[i] + a[i ^ STRIDE] where i has the bit STRIDE not set, else of b.
template <int STRIDE, int... LANES>
INLINE vf add_lanes(vf a, vf b, Lanes<LANES...>) {
    return SHUFFLE(a, b, ((LANES & STRIDE ? VW : 0) + LANES)...) +
           SHUFFLE(a, b, ((LANES & STRIDE ? VW : 0) + (LANES ^ STRIDE))...);
}

// [i] of the result is the sum of all lanes of v[i].
template <int STRIDE = 1>
INLINE vf sums_of_lanes(vf *v) {
    if constexpr (STRIDE == VW) {
        return v[0];
    } else {
#pragma GCC unroll 16
        for (int i = 0; i < VW; i += 2 * STRIDE)
            v[i] = add_lanes<STRIDE>(v[i], v[i + STRIDE], typename FirstLanes<VW>::Type());
        return sums_of_lanes<2 * STRIDE>(v);
    }
}

template <int... LANES>
INLINE vf numbers_of(Lanes<LANES...>) {
    return vf{float(LANES)...};
}

// [first, first + 1, ...]
INLINE vf lane_numbers(int first) { return numbers_of(typename FirstLanes<VW>::Type()) + float(first); }

template <int STRIDE, int... LANES>
INLINE void exchange_lanes(vf &a, vf &b, Lanes<LANES...>) {
    vf low = SHUFFLE(a, b, (LANES & STRIDE ? VW + (LANES ^ STRIDE) : LANES)...);
    b = SHUFFLE(a, b, (LANES & STRIDE ? VW + LANES : (LANES ^ STRIDE))...);
    a = low;
}

// Lane j of v[i] becomes lane i of v[j].
template <int STRIDE = 1>
INLINE void turn(vf *v) {
    if constexpr (STRIDE < VW) {
#pragma GCC unroll 16
        for (int i = 0; i < VW; i++)
            if (!(i & STRIDE)) exchange_lanes<STRIDE>(v[i], v[i + STRIDE], typename FirstLanes<VW>::Type());
        turn<2 * STRIDE>(v);
    }
}

// Polynomials below are least-maximum fits made for these ranges.

// e^x within 2 units in the last place; 0 below -87.3, for x of at most 88.
INLINE vf vexp(vf x) {
    const vf low = splat(-87.33f), high = splat(88.0f);
    const auto is_zero = x < low;
    x = vmin(vmax(x, low), high);
    vf shifted = x * 1.44269504f + 12582912.0f;  // + 1.5 * 2^23 rounds to an integer, which is in the low bits then
    vf n = shifted - 12582912.0f;
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;  // log(2) in two parts, the first exact
    vf p = r * 1.3950486224e-3f + 8.3688878626e-3f;
    p = p * r + 4.1666205873e-2f;
    p = p * r + 1.6666518852e-1f;
    p = p * r + 5.0000000952e-1f;
    p = p * r * r + r + 1.0f;
    vi bits = (vi)p + ((vi)shifted << 23);
    return is_zero ? vf{} : (vf)bits;
}

INLINE vf vtanh(vf x) {
    vf e = vexp(2.0f * vmin(vmax(x, splat(-9.01f)), splat(9.01f)));
    vf large = (e - 1.0f) / (e + 1.0f);
    // near 0 that is a difference of nearly equal numbers: a polynomial instead
    vf s = x * x;
    vf p = s * -5.6607804737e-3f + 2.0601999166e-2f;
    p = p * s - 5.3729227048e-2f;
    p = p * s + 1.3331328919e-1f;
    p = p * s - 3.3333278314e-1f;
    return vmax(x, -x) < 0.625f ? p * s * x + x : large;
}

INLINE vf verf(vf x) {
    vf t = vmin(vmax(x, -x), splat(4.0f)), s = x * x;
    vf small = s * 7.8538576962e-5f - 8.0101925172e-4f;
    small = small * s + 5.1883275595e-3f;
    small = small * s - 2.6853811869e-2f;
    small = small * s + 1.1283585147e-1f;
    small = small * s - 3.7612625824e-1f;
    small = (small * s + 1.1283791657f) * x;
    vf q = t * 1.8557489341e-4f - 2.9396157376e-3f;
    q = q * t + 2.1805351164e-2f;
    q = q * t - 1.0303743554e-1f;
    q = q * t - 6.3822560235e-1f;
    q = q * t - 1.1270400800f;
    q = q * t - 3.5370892418e-4f;
    vf large = 1.0f - vexp(q);
    return t < 1.0f ? small : (x < 0.0f ? -large : large);
}

// Memory of one thread that grows to the largest size it was asked for.
template <class T>
struct Buffer {
    T *memory = nullptr;
    int64_t size = 0;

    T *of(int64_t wanted) {
        if (wanted > size) {
            free(memory);
            memory = static_cast<T *>(aligned_alloc(64, (size_t(wanted) * sizeof(T) + 63) / 64 * 64));
            size = wanted;
        }
        return memory;
    }
};
