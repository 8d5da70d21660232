// AVX-512 with VNNI, as of Cascade Lake and Zen 4: 16 floats in a vector.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "kernels.hpp"
#include "pool.hpp"

#define TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c"
#include "target.hpp"

namespace avx512 {
#define VW 16
#include "vec.hpp"

#define HAS_F16
INLINE vf from_f16(const uint16_t *p) {
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
}
INLINE uint16_t to_f16(float x) { return _cvtss_sh(x, 0); }

#define HAS_INT8
// 16 columns of 4 weights; x comes with 128 added, as unsigned bytes.
struct DotBytes {
    static constexpr int OFFSET = 128;
    __m512i weights;
    INLINE DotBytes of(const int8_t *p) { return {_mm512_loadu_si512(p)}; }
    INLINE vi add_products(vi sums, const DotBytes &w, int32_t four) {
        return (vi)_mm512_dpbusd_epi32((__m512i)sums, _mm512_set1_epi32(four), w.weights);
    }
};

#define HAS_BF16_PAIRS  // of processors that have more than TARGET: module.cpp asks for it
#define PAIRS_TARGET __attribute__((target(TARGET ",avx512bf16")))
// 16 columns of 2 weights.
struct DotPairs {
    __m512i weights;
    INLINE DotPairs of(const uint16_t *p) { return {_mm512_loadu_si512(p)}; }
    PAIRS_TARGET INLINE vf add_products(vf sums, const DotPairs &w, int32_t pair) {
        return (vf)_mm512_dpbf16_ps((__m512)sums, (__m512bh)w.weights, (__m512bh)_mm512_set1_epi32(pair));
    }
    PAIRS_TARGET INLINE void round(vf x, uint16_t *out) {
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), (__m256i)_mm512_cvtneps_pbh((__m512)x));
    }
};

#include "table.hpp"
}  // namespace avx512

constinit const Kernels kernels_avx512 = avx512::make_table("avx512");
#include "target_end.hpp"
#endif
