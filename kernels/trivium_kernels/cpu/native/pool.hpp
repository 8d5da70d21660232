// A pool of threads that share the work of one operator.
//
// Between operators of a step the threads spin, because the next operator comes within microseconds; when none comes
// they sleep, so that the other processes of the machine get the cores.
#pragma once

#include <cstdint>

// One share of the work: pieces [begin, end). Called by several threads at once, with disjoint ranges.
using PoolTask = void (*)(const void *arg, int64_t begin, int64_t end);

// Run `task` over [0, count), `grain` at a time, on at most `num_threads` threads. Returns when all is done.
void pool_run(PoolTask task, const void *arg, int64_t count, int64_t grain, int num_threads);
