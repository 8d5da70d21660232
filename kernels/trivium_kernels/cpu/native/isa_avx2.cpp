// AVX2 with FMA, as of Haswell and Zen: 8 floats in a vector.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "kernels.hpp"
#include "pool.hpp"

#define TARGET "avx2,fma,f16c"
#include "target.hpp"

namespace avx2 {
#define VW 8
#include "vec.hpp"

#define HAS_F16
INLINE vf from_f16(const uint16_t *p) {
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
INLINE uint16_t to_f16(float x) { return _cvtss_sh(x, 0); }

#define HAS_INT8
// 8 columns of 4 weights. The product of bytes takes one factor without a sign: |w|, and x with the sign of w. Two products
// of at most 127 * 127 fit into 16 bits.
struct DotBytes {
    static constexpr int OFFSET = 0;
    __m256i weights, magnitudes;
    INLINE DotBytes of(const int8_t *p) {
        __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
        return {w, _mm256_abs_epi8(w)};
    }
    INLINE vi add_products(vi sums, const DotBytes &w, int32_t four) {
        __m256i x = _mm256_sign_epi8(_mm256_set1_epi32(four), w.weights);
        __m256i pairs = _mm256_maddubs_epi16(w.magnitudes, x);
        return sums + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
};

#include "table.hpp"
}  // namespace avx2

constinit const Kernels kernels_avx2 = avx2::make_table("avx2");
#include "target_end.hpp"
#endif
