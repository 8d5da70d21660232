// The Python module trivium_kernels.cpu._native: kernels for CPUs behind plain functions. Tensors come as addresses.
//
// Nothing is checked here: trivium_kernels/cpu/ passes contiguous float32 of the right shapes.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdlib>
#include <cstring>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.hpp"
#include "pool.hpp"

namespace {

const Kernels *kernels;
thread_local int num_threads = 1;

constexpr size_t HUGE_PAGE = size_t(1) << 21;
constexpr double WORTH_RELEASING = 1e5;  // operations; shorter calls keep the interpreter lock

struct Packed {
    Gemm gemm;  // without x, y and m
    const Kernels *kernels;
    void *memory;
};

const char PACKED[] = "trivium_kernels.packed";

void free_packed(PyObject *capsule) {
    auto *packed = static_cast<Packed *>(PyCapsule_GetPointer(capsule, PACKED));
    free(packed->memory);
    free(packed);
}

bool read_numbers(PyObject *const *args, Py_ssize_t count, Py_ssize_t wanted, int64_t *out) {
    if (count != wanted) {
        PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", wanted, count);
        return false;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        out[i] = PyLong_AsLongLong(args[i]);
        if (out[i] == -1 && PyErr_Occurred()) return false;
    }
    return true;
}

template <class T>
T *address(int64_t number) {
    return reinterpret_cast<T *>(number);
}

const Kernels *find_kernels(const char *name) {
#if defined(__x86_64__)
    bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
    bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (has_avx512 && (!name || !strcmp(name, "avx512"))) return &kernels_avx512;
    if (has_avx2 && (!name || !strcmp(name, "avx2"))) return &kernels_avx2;
#endif
    return !name || !strcmp(name, "base") ? &kernels_base : nullptr;
}

PyObject *instruction_set(PyObject *, PyObject *) { return PyUnicode_FromString(kernels->name); }

PyObject *use_instruction_set(PyObject *, PyObject *name) {
    const char *text = PyUnicode_AsUTF8(name);
    if (!text) return nullptr;
    const Kernels *found = find_kernels(text);
    if (!found) return PyErr_Format(PyExc_ValueError, "this processor has no instruction set %s", text);
    kernels = found;
    Py_RETURN_NONE;
}

PyObject *set_num_threads(PyObject *, PyObject *number) {
    long value = PyLong_AsLong(number);
    if (value == -1 && PyErr_Occurred()) return nullptr;
    num_threads = value < 1 ? 1 : int(value);
    Py_RETURN_NONE;
}

PyObject *supports(PyObject *, PyObject *type) {
    long value = PyLong_AsLong(type);
    if (value == -1 && PyErr_Occurred()) return nullptr;
    return PyBool_FromLong(value >= 0 && value < NUM_WEIGHT_TYPES && kernels->supports[value]);
}

// pack(type, weight, bias or 0, n, k) -> capsule. The bias must stay where it is.
PyObject *pack(PyObject *, PyObject *const *args, Py_ssize_t count) {
    int64_t v[5];
    if (!read_numbers(args, count, 5, v)) return nullptr;
    auto type = WeightType(v[0]);
    auto bytes = size_t(kernels->packed_bytes(type, v[3], v[4]));
    size_t alignment = bytes >= HUGE_PAGE ? HUGE_PAGE : 64;
    void *memory = aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
    auto *packed = static_cast<Packed *>(calloc(1, sizeof(Packed)));
    if (!memory || !packed) {
        free(memory), free(packed);
        return PyErr_NoMemory();
    }
#if defined(__linux__)
    if (alignment == HUGE_PAGE) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    packed->memory = memory;
    packed->kernels = kernels;
    packed->gemm.panels = memory;
    packed->gemm.bias = address<const float>(v[2]);
    packed->gemm.n = v[3], packed->gemm.k = v[4];
    packed->gemm.type = type;
    Py_BEGIN_ALLOW_THREADS
    kernels->pack(type, address<const float>(v[1]), v[3], v[4], memory, num_threads);
    Py_END_ALLOW_THREADS
    return PyCapsule_New(packed, PACKED, free_packed);
}

// multiply(packed, x, m, x_stride, y, y_stride, add or 0, add_stride)
PyObject *multiply(PyObject *, PyObject *const *args, Py_ssize_t count) {
    int64_t v[7];
    auto *packed = count ? static_cast<Packed *>(PyCapsule_GetPointer(args[0], PACKED)) : nullptr;
    if (count && !packed) return nullptr;
    if (!read_numbers(args + 1, count - 1, 7, v)) return nullptr;
    Gemm g = packed->gemm;
    g.x = address<const float>(v[0]), g.m = v[1], g.x_stride = v[2];
    g.y = address<float>(v[3]), g.y_stride = v[4];
    g.add = address<const float>(v[5]), g.add_stride = v[6];
    if (double(g.m) * double(g.n) * double(g.k) < WORTH_RELEASING) {
        packed->kernels->gemm(g, 1);
    } else {
        Py_BEGIN_ALLOW_THREADS
        packed->kernels->gemm(g, num_threads);
        Py_END_ALLOW_THREADS
    }
    Py_RETURN_NONE;
}

float to_float(int64_t bits) {  // sent as an integer, so that all arguments are read alike
    auto low = uint32_t(bits);
    float value;
    memcpy(&value, &low, sizeof value);
    return value;
}

// norm(x, weight, bias or 0, y, eps bits, rows, inner, outer_stride, inner_stride, width)
PyObject *norm(PyObject *, PyObject *const *args, Py_ssize_t count) {
    int64_t v[10];
    if (!read_numbers(args, count, 10, v)) return nullptr;
    NormRows job = {address<const float>(v[0]), address<const float>(v[1]), address<const float>(v[2]),
                    address<float>(v[3]), to_float(v[4]), v[5], v[6], v[7], v[8], v[9]};
    kernels->norm(job, num_threads);
    Py_RETURN_NONE;
}

// activate(x, y, rows, width, x_stride, kind, is_gated)
PyObject *activate(PyObject *, PyObject *const *args, Py_ssize_t count) {
    int64_t v[7];
    if (!read_numbers(args, count, 7, v)) return nullptr;
    ActivateRows job = {address<const float>(v[0]), address<float>(v[1]), v[2], v[3], v[4], ActivationKind(v[5]), v[6] != 0};
    kernels->activate(job, num_threads);
    Py_RETURN_NONE;
}

// rotate(x, cosine, sine, y, num_tokens, num_heads, head_dim, rotary_dim, token_stride)
PyObject *rotate(PyObject *, PyObject *const *args, Py_ssize_t count) {
    int64_t v[9];
    if (!read_numbers(args, count, 9, v)) return nullptr;
    RotateHeads job = {address<const float>(v[0]), address<const float>(v[1]), address<const float>(v[2]),
                       address<float>(v[3]), v[4], v[5], v[6], v[7], v[8]};
    kernels->rotate(job, num_threads);
    Py_RETURN_NONE;
}

// write_cache(key, value, key_cache, value_cache, slots, num_tokens, row_width, key_stride, value_stride, block_size,
//             block_stride)
PyObject *write_cache(PyObject *, PyObject *const *args, Py_ssize_t count) {
    int64_t v[11];
    if (!read_numbers(args, count, 11, v)) return nullptr;
    CacheWrite job = {address<const float>(v[0]), address<const float>(v[1]), address<float>(v[2]), address<float>(v[3]),
                      address<const int64_t>(v[4]), v[5], v[6], v[7], v[8], v[9], v[10]};
    kernels->write_cache(job, num_threads);
    Py_RETURN_NONE;
}

// rotate_and_cache(qkv, cosine, sine, query_norm or 0, key_norm or 0, queries, key_cache, value_cache, slots, num_tokens,
//                  num_heads, num_kv_heads, head_dim, rotary_dim, token_stride, block_size, block_stride, eps bits)
PyObject *rotate_and_cache(PyObject *, PyObject *const *args, Py_ssize_t count) {
    int64_t v[18];
    if (!read_numbers(args, count, 18, v)) return nullptr;
    RotateAndCache job = {address<const float>(v[0]), address<const float>(v[1]), address<const float>(v[2]),
                          address<const float>(v[3]), address<const float>(v[4]), address<float>(v[5]),
                          address<float>(v[6]), address<float>(v[7]), address<const int64_t>(v[8]),
                          v[9], v[10], v[11], v[12], v[13], v[14], v[15], v[16], to_float(v[17])};
    kernels->rotate_and_cache(job, num_threads);
    Py_RETURN_NONE;
}

// attend(query, keys, values, bias or 0, output, tables or 0, segments, num_segments, num_heads, num_kv_heads, head_dim,
//        query_stride, token_stride, table_stride, block_size, block_stride, window or 0, max_distance, scale bits,
//        soft cap bits, is_causal)
PyObject *attend(PyObject *, PyObject *const *args, Py_ssize_t count) {
    int64_t v[21];
    if (!read_numbers(args, count, 21, v)) return nullptr;
    Attention a = {address<const float>(v[0]),
                   address<const float>(v[1]),
                   address<const float>(v[2]),
                   address<const float>(v[3]),
                   address<float>(v[4]),
                   address<const int32_t>(v[5]),
                   address<const Segment>(v[6]),
                   v[7],
                   v[8],
                   v[9],
                   v[10],
                   v[11],
                   v[12],
                   v[13],
                   v[14],
                   v[15],
                   v[16],
                   v[17],
                   to_float(v[18]),
                   to_float(v[19]),
                   v[20] != 0};
    Py_BEGIN_ALLOW_THREADS
    kernels->attend(a, num_threads);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

#define FAST(function) reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function))

PyMethodDef methods[] = {
    {"instruction_set", instruction_set, METH_NOARGS, "Name of the instruction set in use."},
    {"use_instruction_set", use_instruction_set, METH_O, "Use another one that this processor has: for tests."},
    {"set_num_threads", set_num_threads, METH_O, "Of the operators that the calling thread starts from now on."},
    {"supports", supports, METH_O, "Whether there are products of this type of weights."},
    {"pack", FAST(pack), METH_FASTCALL, "Pack a weight."},
    {"multiply", FAST(multiply), METH_FASTCALL, "Multiply rows with a packed weight."},
    {"norm", FAST(norm), METH_FASTCALL, "RMSNorm, or LayerNorm."},
    {"activate", FAST(activate), METH_FASTCALL, "Activation, gated or not."},
    {"rotate", FAST(rotate), METH_FASTCALL, "Rotary embedding."},
    {"write_cache", FAST(write_cache), METH_FASTCALL, "Keys and values to their slots."},
    {"rotate_and_cache", FAST(rotate_and_cache), METH_FASTCALL, "Head norms, rotary embedding and the cache in one pass."},
    {"attend", FAST(attend), METH_FASTCALL, "Attention to blocks, or to neighbours."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", "Kernels for CPUs.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() {
    kernels = find_kernels(nullptr);
    return PyModule_Create(&definition);
}
