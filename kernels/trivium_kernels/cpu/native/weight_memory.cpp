#include "weight_memory.hpp"

#include <cstdlib>
#if defined(__linux__)
#include <sys/mman.h>
#endif

struct WeightChunk {
    char *memory;
    size_t size, used;
    int64_t num_weights;
};

namespace {

constexpr size_t HUGE_PAGE = size_t(1) << 21;
constexpr size_t CHUNK = size_t(1) << 26;
constexpr size_t LINE = 64;

WeightChunk *current;  // where the next weight goes if it fits

size_t round_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

WeightChunk *allocate_chunk(size_t bytes) {
    const size_t size = round_up(bytes, HUGE_PAGE);
    auto *chunk = static_cast<WeightChunk *>(calloc(1, sizeof(WeightChunk)));
    auto *memory = static_cast<char *>(aligned_alloc(HUGE_PAGE, size));
    if (!chunk || !memory) {
        free(chunk), free(memory);
        return nullptr;
    }
#if defined(__linux__)
    madvise(memory, size, MADV_HUGEPAGE);
#endif
    *chunk = {memory, size, 0, 0};
    return chunk;
}

}  // namespace

WeightMemory allocate_weight(size_t bytes) {
    bytes = round_up(bytes, LINE);
    WeightChunk *chunk = current;
    if (!chunk || chunk->size - chunk->used < bytes) {
        chunk = allocate_chunk(bytes < CHUNK ? CHUNK : bytes);
        if (!chunk) return {};
        if (bytes < CHUNK) current = chunk;
    }
    char *memory = chunk->memory + chunk->used;
    chunk->used += bytes;
    chunk->num_weights++;
    return {memory, chunk};
}

void free_weight(const WeightMemory &memory) {
    WeightChunk *chunk = memory.chunk;
    if (!chunk || --chunk->num_weights > 0) return;
    if (chunk == current) current = nullptr;
    free(chunk->memory);
    free(chunk);
}
