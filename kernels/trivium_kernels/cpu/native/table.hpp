// All kernels of one instruction set, put into its table.
// so many rows of `cost` floats are worth handing to another thread
#define ROWS_WORTH(cost) ((cost) > 16384 ? 1 : 16384 / (cost) + 1)
#include "gemm.hpp"
#include "ops.hpp"
#include "attention.hpp"

static constexpr Kernels make_table(const char *name) {
    Kernels table = {};
    table.name = name;
    table.supports[WEIGHT_F32] = table.supports[WEIGHT_BF16] = true;
#ifdef HAS_F16
    table.supports[WEIGHT_F16] = true;
#endif
#ifdef HAS_INT8
    table.supports[WEIGHT_INT8] = true;
#endif
#ifdef HAS_BF16_PAIRS
    table.supports[WEIGHT_BF16_PAIRS] = true;
#endif
    table.packed_bytes = packed_bytes;
    table.pack = pack;
    table.gemm = multiply;
    table.norm = norm;
    table.activate = activate;
    table.rotate = rotate;
    table.write_cache = write_cache;
    table.rotate_and_cache = rotate_and_cache;
    table.apply_token_bitmask = apply_token_bitmask;
    table.attend = attend;
    return table;
}
