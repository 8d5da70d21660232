// What every processor of the platform has (SSE2, NEON): 4 floats in a vector.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "kernels.hpp"
#include "pool.hpp"

namespace base {
#define VW 4
#include "vec.hpp"

#if defined(__aarch64__)
#define HAS_F16
INLINE vf from_f16(const uint16_t *p) {
    typedef __fp16 halves __attribute__((vector_size(2 * VW)));
    halves v;
    memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, vf);
}
INLINE uint16_t to_f16(float x) {
    __fp16 half = __fp16(x);
    uint16_t bits;
    memcpy(&bits, &half, sizeof bits);
    return bits;
}
#endif

#include "table.hpp"
}  // namespace base

constinit const Kernels kernels_base = base::make_table("base");
