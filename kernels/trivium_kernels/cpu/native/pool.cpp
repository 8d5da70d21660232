// Threads take pieces of the work from a common counter, so that one which the system has put aside holds up nobody.
//
// `state` publishes a job: its number, how many workers may join, whether they still may, and how many have joined.
// Workers wait for a new number, spinning first and sleeping on a condition later. The caller computes too, then closes
// the job and waits only for workers that have joined: one that did not wake up in time is not missed.
// One job runs at a time; a second caller (another engine of the same process) computes alone.
#include "pool.hpp"

#include <pthread.h>
#include <sched.h>

#include <atomic>

namespace {

constexpr int MAX_WORKERS = 255;
constexpr int SPINS_BEFORE_SLEEP = 20000;  // about 200 us: longer than the time between two operators of a step
constexpr int SPINS_BEFORE_YIELD = 2000;

constexpr uint64_t JOINED = 0xFFFF;
constexpr uint64_t OPEN = uint64_t(1) << 16;
constexpr int LIMIT_SHIFT = 17;
constexpr int NUMBER_SHIFT = 32;

struct {
    PoolTask task;
    const void *arg;
    int64_t count, grain;
} job;

std::atomic<int64_t> next_piece;
std::atomic<uint64_t> state;
std::atomic<int> num_sleeping;
std::atomic<bool> is_busy;
int num_started;
pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t wake = PTHREAD_COND_INITIALIZER;

inline void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

uint64_t number_of(uint64_t s) { return s >> NUMBER_SHIFT; }

void work() {
    for (;;) {
        int64_t begin = next_piece.fetch_add(job.grain, std::memory_order_relaxed);
        if (begin >= job.count) return;
        int64_t end = begin + job.grain < job.count ? begin + job.grain : job.count;
        job.task(job.arg, begin, end);
    }
}

// The number of a job that is not `seen`.
uint64_t wait_for_job(uint64_t seen) {
    uint64_t number;
    for (int spin = 0; spin < SPINS_BEFORE_SLEEP; spin++) {
        number = number_of(state.load(std::memory_order_acquire));
        if (number != seen) return number;
        pause_briefly();
    }
    pthread_mutex_lock(&mutex);
    num_sleeping++;
    while ((number = number_of(state.load())) == seen) pthread_cond_wait(&wake, &mutex);
    num_sleeping--;
    pthread_mutex_unlock(&mutex);
    return number;
}

bool join(uint64_t number) {
    uint64_t s = state.load(std::memory_order_acquire);
    do {
        uint64_t limit = (s >> LIMIT_SHIFT) & 0xFF;
        if (number_of(s) != number || !(s & OPEN) || (s & JOINED) >= limit) return false;
    } while (!state.compare_exchange_weak(s, s + 1));
    return true;
}

void *run_worker(void *argument) {
    uint64_t seen = reinterpret_cast<uintptr_t>(argument);
    for (;;) {
        seen = wait_for_job(seen);
        if (!join(seen)) continue;
        work();
        state.fetch_sub(1, std::memory_order_release);
    }
    return nullptr;
}

int start_workers(int wanted, uint64_t seen) {
    if (wanted > MAX_WORKERS) wanted = MAX_WORKERS;
    while (num_started < wanted) {
        pthread_t thread;
        if (pthread_create(&thread, nullptr, run_worker, reinterpret_cast<void *>(uintptr_t(seen)))) break;
        pthread_detach(thread);
        num_started++;
    }
    return wanted < num_started ? wanted : num_started;
}

}  // namespace

void pool_run(PoolTask task, const void *arg, int64_t count, int64_t grain, int num_threads) {
    int64_t num_pieces = (count + grain - 1) / grain;
    if (num_pieces < num_threads) num_threads = int(num_pieces);
    if (num_threads <= 1 || is_busy.exchange(true)) {
        task(arg, 0, count);
        return;
    }
    uint64_t number = number_of(state.load());
    uint64_t limit = uint64_t(start_workers(num_threads - 1, number));
    job = {task, arg, count, grain};
    next_piece.store(0, std::memory_order_relaxed);
    state.store(((number + 1) & 0xFFFFFFFF) << NUMBER_SHIFT | limit << LIMIT_SHIFT | OPEN);
    if (num_sleeping.load()) {
        pthread_mutex_lock(&mutex);
        pthread_cond_broadcast(&wake);
        pthread_mutex_unlock(&mutex);
    }
    work();
    state.fetch_and(~OPEN);
    for (int spin = 0; state.load(std::memory_order_acquire) & JOINED; spin++) {
        if (spin > SPINS_BEFORE_YIELD) sched_yield();
        pause_briefly();
    }
    is_busy.store(false);
}
