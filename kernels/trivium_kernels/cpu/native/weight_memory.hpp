// Memory of packed weights: side by side in chunks of huge pages, so that reading all of them in turn misses few address
// translations. In pages of 4 KiB a product of one row with a weight of 1.3 MiB took 1.6 times as long.
#pragma once

#include <cstddef>
#include <cstdint>

struct WeightChunk;

// `bytes` at a multiple of 64, in a chunk that `free_weight` takes back with its last weight; null if there are none.
// Of what is not written to no memory is taken. Both functions are for one thread at a time.
struct WeightMemory {
    void *bytes;
    WeightChunk *chunk;
};

WeightMemory allocate_weight(size_t bytes);
void free_weight(const WeightMemory &memory);
