// The Python module trivium_kernels.cpu._native: kernels for CPUs behind plain functions. Tensors come as addresses.
//
// Nothing is checked here: trivium_kernels/cpu/ passes contiguous float32 of the right shapes.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels.hpp"
#include "pool.hpp"
#include "weight_memory.hpp"

namespace {

const Kernels *kernels;
thread_local int num_threads = 1;

constexpr double WORTH_RELEASING = 1e5;  // operations; shorter calls keep the interpreter lock

struct Packed {
    Gemm gemm;  // without x, y and m
    const Kernels *kernels;
    WeightMemory memory;
};

const char PACKED[] = "trivium_kernels.packed";

void free_packed(PyObject *capsule) {
    auto *packed = static_cast<Packed *>(PyCapsule_GetPointer(capsule, PACKED));
    free_weight(packed->memory);
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

PyObject *get_num_threads(PyObject *, PyObject *) { return PyLong_FromLong(num_threads); }

bool has_bf16_pairs() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

PyObject *supports(PyObject *, PyObject *type) {
    long value = PyLong_AsLong(type);
    if (value == -1 && PyErr_Occurred()) return nullptr;
    if (value < 0 || value >= NUM_WEIGHT_TYPES || !kernels->supports[value]) Py_RETURN_FALSE;
    return PyBool_FromLong(value != WEIGHT_BF16_PAIRS || has_bf16_pairs());
}

// pack(type, weight, bias or 0, n, k) -> capsule. The bias must stay where it is.
PyObject *pack(PyObject *, PyObject *const *args, Py_ssize_t count) {
    int64_t v[5];
    if (!read_numbers(args, count, 5, v)) return nullptr;
    auto type = WeightType(v[0]);
    auto bytes = size_t(kernels->packed_bytes(type, v[3], v[4]));
    const WeightMemory memory = allocate_weight(bytes);
    auto *packed = static_cast<Packed *>(calloc(1, sizeof(Packed)));
    if (!memory.bytes || !packed) {
        free_weight(memory), free(packed);
        return PyErr_NoMemory();
    }
    packed->memory = memory;
    packed->kernels = kernels;
    packed->gemm.panels = memory.bytes;
    packed->gemm.bias = address<const float>(v[2]);
    packed->gemm.n = v[3], packed->gemm.k = v[4];
    packed->gemm.type = type;
    Py_BEGIN_ALLOW_THREADS
    kernels->pack(type, address<const float>(v[1]), v[3], v[4], memory.bytes, num_threads);
    Py_END_ALLOW_THREADS
    return PyCapsule_New(packed, PACKED, free_packed);
}

enum OperatorKind { MULTIPLY, NORM, ACTIVATE, ROTATE, WRITE_CACHE, ROTATE_AND_CACHE, APPLY_TOKEN_BITMASK, ATTEND };

// Where the rows of an attention are: the part of its arguments that changes from step to step. It is read when the
// operator runs, so that a recorded one can be told of other rows.
struct Rows {
    const Segment *segments;
    int64_t num_segments;
    const int32_t *tables;
    int64_t table_stride;
};

// An operator with its arguments.
struct Operator {
    OperatorKind kind;
    const Kernels *kernels;
    union {
        Gemm multiply;
        NormRows norm;
        ActivateRows activate;
        RotateHeads rotate;
        CacheWrite write_cache;
        RotateAndCache rotate_and_cache;
        TokenBitmask apply_token_bitmask;
        struct {
            Attention attention;
            const Rows *rows;
        } attend;
    };
};

void run(const Operator &op, int threads) {
    switch (op.kind) {
        case MULTIPLY: return op.kernels->gemm(op.multiply, threads);
        case NORM: return op.kernels->norm(op.norm, threads);
        case ACTIVATE: return op.kernels->activate(op.activate, threads);
        case ROTATE: return op.kernels->rotate(op.rotate, threads);
        case WRITE_CACHE: return op.kernels->write_cache(op.write_cache, threads);
        case ROTATE_AND_CACHE: return op.kernels->rotate_and_cache(op.rotate_and_cache, threads);
        case APPLY_TOKEN_BITMASK: return op.kernels->apply_token_bitmask(op.apply_token_bitmask, threads);
        case ATTEND: {
            Attention a = op.attend.attention;
            const Rows &rows = *op.attend.rows;
            a.segments = rows.segments, a.num_segments = rows.num_segments;
            a.tables = rows.tables, a.table_stride = rows.table_stride;
            return op.kernels->attend(a, threads);
        }
    }
}

// Whether a product is done by the calling thread alone.
bool is_short(const Operator &op) {
    const Gemm &g = op.multiply;
    return op.kind == MULTIPLY && double(g.m) * double(g.n) * double(g.k) < WORTH_RELEASING;
}

int threads_for(const Operator &op) { return is_short(op) ? 1 : num_threads; }

// ---- recordings: the operators of one thread, to be run again with the same arguments ----

struct Recording {
    std::vector<Operator> operators;
    std::vector<PyObject *> packed;  // weights that they read
};

const char RECORDING[] = "trivium_kernels.recording";
thread_local Recording *recording;

void free_recording(PyObject *capsule) {
    auto *found = static_cast<Recording *>(PyCapsule_GetPointer(capsule, RECORDING));
    for (PyObject *packed : found->packed) Py_DECREF(packed);
    delete found;
}

// start_recording() -> capsule. Whatever the calling thread runs is written down too, until `stop_recording`.
PyObject *start_recording(PyObject *, PyObject *) {
    auto *made = new Recording();
    PyObject *capsule = PyCapsule_New(made, RECORDING, free_recording);
    if (!capsule) {
        delete made;
        return nullptr;
    }
    recording = made;
    return capsule;
}

PyObject *stop_recording(PyObject *, PyObject *) {
    recording = nullptr;
    Py_RETURN_NONE;
}

// num_recorded(capsule) -> operators so far
PyObject *num_recorded(PyObject *, PyObject *capsule) {
    auto *found = static_cast<Recording *>(PyCapsule_GetPointer(capsule, RECORDING));
    return found ? PyLong_FromSize_t(found->operators.size()) : nullptr;
}

// replay(capsule, begin, end): run its operators [begin, end) again.
PyObject *replay(PyObject *, PyObject *const *args, Py_ssize_t count) {
    int64_t v[2];
    auto *found = count ? static_cast<Recording *>(PyCapsule_GetPointer(args[0], RECORDING)) : nullptr;
    if (count && !found) return nullptr;
    if (!read_numbers(args + 1, count - 1, 2, v)) return nullptr;
    Py_BEGIN_ALLOW_THREADS
    for (int64_t i = v[0]; i < v[1]; i++) run(found->operators[size_t(i)], threads_for(found->operators[size_t(i)]));
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

// Run an operator for Python. packed: the weight that it reads, or null.
PyObject *finish(const Operator &op, bool is_long, PyObject *packed = nullptr) {
    if (recording) {
        recording->operators.push_back(op);
        if (packed) {
            Py_INCREF(packed);
            recording->packed.push_back(packed);
        }
    }
    const int threads = threads_for(op);
    if (is_long) {
        Py_BEGIN_ALLOW_THREADS
        run(op, threads);
        Py_END_ALLOW_THREADS
    } else {
        run(op, threads);
    }
    Py_RETURN_NONE;
}

// multiply(packed, x, m, x_stride, y, y_stride, add or 0, add_stride)
PyObject *multiply(PyObject *, PyObject *const *args, Py_ssize_t count) {
    int64_t v[7];
    auto *packed = count ? static_cast<Packed *>(PyCapsule_GetPointer(args[0], PACKED)) : nullptr;
    if (count && !packed) return nullptr;
    if (!read_numbers(args + 1, count - 1, 7, v)) return nullptr;
    Operator op = {MULTIPLY, packed->kernels, {.multiply = packed->gemm}};
    Gemm &g = op.multiply;
    g.x = address<const float>(v[0]), g.m = v[1], g.x_stride = v[2];
    g.y = address<float>(v[3]), g.y_stride = v[4];
    g.add = address<const float>(v[5]), g.add_stride = v[6];
    return finish(op, !is_short(op), args[0]);
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
    return finish({NORM, kernels, {.norm = job}}, false);
}

// activate(x, y, rows, width, x_stride, kind, is_gated)
PyObject *activate(PyObject *, PyObject *const *args, Py_ssize_t count) {
    int64_t v[7];
    if (!read_numbers(args, count, 7, v)) return nullptr;
    ActivateRows job = {address<const float>(v[0]), address<float>(v[1]), v[2], v[3], v[4], ActivationKind(v[5]), v[6] != 0};
    return finish({ACTIVATE, kernels, {.activate = job}}, false);
}

// rotate(x, cosine, sine, y, num_tokens, num_heads, head_dim, rotary_dim, token_stride)
PyObject *rotate(PyObject *, PyObject *const *args, Py_ssize_t count) {
    int64_t v[9];
    if (!read_numbers(args, count, 9, v)) return nullptr;
    RotateHeads job = {address<const float>(v[0]), address<const float>(v[1]), address<const float>(v[2]),
                       address<float>(v[3]), v[4], v[5], v[6], v[7], v[8]};
    return finish({ROTATE, kernels, {.rotate = job}}, false);
}

// write_cache(key, value, key_cache, value_cache, slots, num_tokens, row_width, key_stride, value_stride, block_size,
//             block_stride)
PyObject *write_cache(PyObject *, PyObject *const *args, Py_ssize_t count) {
    int64_t v[11];
    if (!read_numbers(args, count, 11, v)) return nullptr;
    CacheWrite job = {address<const float>(v[0]), address<const float>(v[1]), address<float>(v[2]), address<float>(v[3]),
                      address<const int64_t>(v[4]), v[5], v[6], v[7], v[8], v[9], v[10]};
    return finish({WRITE_CACHE, kernels, {.write_cache = job}}, false);
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
    return finish({ROTATE_AND_CACHE, kernels, {.rotate_and_cache = job}}, false);
}

// apply_token_bitmask(logits, bitmask, rows, num_masks, vocab_size, logits_stride, bitmask_stride)
PyObject *apply_token_bitmask(PyObject *, PyObject *const *args, Py_ssize_t count) {
    int64_t v[7];
    if (!read_numbers(args, count, 7, v)) return nullptr;
    TokenBitmask job = {address<float>(v[0]), address<const uint32_t>(v[1]), address<const int64_t>(v[2]),
                        v[3], v[4], v[5], v[6]};
    return finish({APPLY_TOKEN_BITMASK, kernels, {.apply_token_bitmask = job}}, false);
}

// attend(query, keys, values, bias or 0, output, rows, num_heads, num_kv_heads, head_dim, query_stride, token_stride,
//        block_size, block_stride, window or 0, max_distance, scale bits, soft cap bits, is_causal)
PyObject *attend(PyObject *, PyObject *const *args, Py_ssize_t count) {
    int64_t v[18];
    if (!read_numbers(args, count, 18, v)) return nullptr;
    Attention a = {};
    a.query = address<const float>(v[0]), a.keys = address<const float>(v[1]), a.values = address<const float>(v[2]);
    a.bias = address<const float>(v[3]), a.output = address<float>(v[4]);
    a.num_heads = v[6], a.num_kv_heads = v[7], a.head_dim = v[8];
    a.query_stride = v[9], a.token_stride = v[10], a.block_size = v[11], a.block_stride = v[12];
    a.window = v[13], a.max_distance = v[14], a.scale = to_float(v[15]), a.soft_cap = to_float(v[16]);
    a.is_causal = v[17] != 0;
    return finish({ATTEND, kernels, {.attend = {a, address<const Rows>(v[5])}}}, true);
}

#define FAST(function) reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function))

PyMethodDef methods[] = {
    {"instruction_set", instruction_set, METH_NOARGS, "Name of the instruction set in use."},
    {"use_instruction_set", use_instruction_set, METH_O, "Use another one that this processor has: for tests."},
    {"num_threads", get_num_threads, METH_NOARGS, "Of the operators that the calling thread starts."},
    {"set_num_threads", set_num_threads, METH_O, "Of the operators that the calling thread starts from now on."},
    {"supports", supports, METH_O, "Whether there are products of this type of weights."},
    {"pack", FAST(pack), METH_FASTCALL, "Pack a weight."},
    {"multiply", FAST(multiply), METH_FASTCALL, "Multiply rows with a packed weight."},
    {"norm", FAST(norm), METH_FASTCALL, "RMSNorm, or LayerNorm."},
    {"activate", FAST(activate), METH_FASTCALL, "Activation, gated or not."},
    {"rotate", FAST(rotate), METH_FASTCALL, "Rotary embedding."},
    {"write_cache", FAST(write_cache), METH_FASTCALL, "Keys and values to their slots."},
    {"rotate_and_cache", FAST(rotate_and_cache), METH_FASTCALL, "Head norms, rotary embedding and the cache in one pass."},
    {"apply_token_bitmask", FAST(apply_token_bitmask), METH_FASTCALL, "-inf for tokens that a mask does not allow."},
    {"attend", FAST(attend), METH_FASTCALL, "Attention to blocks, or to neighbours."},
    {"start_recording", start_recording, METH_NOARGS, "Write down the operators of this thread."},
    {"stop_recording", stop_recording, METH_NOARGS, "Write down no more."},
    {"num_recorded", num_recorded, METH_O, "Operators of a recording so far."},
    {"replay", FAST(replay), METH_FASTCALL, "Run operators of a recording again."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", "Kernels for CPUs.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() {
    kernels = find_kernels(nullptr);
    return PyModule_Create(&definition);
}
