// Attention of packed queries to keys and values in blocks, or side by side.
//
// A task is up to QUERIES queries of one segment (a token's heads that share a key head are as many queries) and some key
// heads. It goes over the keys that the queries see, KEYS at a time, and for these over the heads: keys and values of
// all heads of a token lie side by side. Softmax has a running maximum and sum (https://arxiv.org/abs/2205.14135).
//
// Few queries are multiplied with the keys as they lie, and the lanes of each product summed; for many, the keys of a tile
// are turned into columns once, and a vector has the scores of as many keys. Both add the same numbers in the same order.
//
// A query has the same bits whatever else is computed: its sums go over the same tiles of keys in the same order, alone or in
// a batch, in a prompt or one token at a time. What it does not see of a tile weighs exactly 0.

constexpr int QUERIES = 64;
constexpr int KEYS = 64;
constexpr int TURNED = 12;  // so many queries are worth turning the keys: measured 8 with heads of 64, 16 to 24 with 128
constexpr int HEADS = 16;   // key heads of a task at most
constexpr float HIDDEN = -1e30f;

// Keys of one segment, from some position on: where they and their values lie, of the first key head of the task.
struct KeyTile {
    const float *keys[KEYS], *values[KEYS], *next_keys[KEYS];
    int64_t first;  // position of the first one
    int count, next_count;
    int padded;  // count rounded up to whole vectors: so many scores there are
};

// The queries of one key head.
struct Tile {
    const Attention *a;
    const float *query[QUERIES];
    int64_t position[QUERIES];  // of each query in its sequence
    int64_t head[QUERIES];
    int num_queries;
    int64_t key_offset;  // of the key head, in a row of the task
    float scores[QUERIES][KEYS];
    float most[QUERIES], sum[QUERIES];
    float *sums;  // [QUERIES][head_dim]
};

// Few queries wait for memory. It is fastest where it is read in the order in which it lies, so that the hardware asks for
// it ahead: all heads go over a few tokens before the next ones, the more the more queries there are, until those of a head
// have TOGETHER numbers for each query. And it is asked for AHEAD numbers before, across tiles and tasks; of more
// lines at once the hardware forgets some. Both measured on Zen 4.
constexpr int TOGETHER = 256;
constexpr int AHEAD = 2048;

// To the second-level cache, because the first may be full of what is used before it.
INLINE void prefetch_row(const float *row, int64_t size) {
    for (int64_t at = 0; at < size; at += 16) __builtin_prefetch(row + at, 0, 2);
}

// Row `number` of `count` rows, or of those that come after them.
INLINE void prefetch_row_of(
    const float *const *rows, int count, const float *const *later, int later_count, int64_t number, int64_t size) {
    if (number < count)
        prefetch_row(rows[number], size);
    else if (number - count < later_count)
        prefetch_row(later[number - count], size);
}

// How many keys of the tile query `q` sees, counted from its first one. Those that a window hides at the start count.
INLINE int num_seen(const Tile &t, const KeyTile &tile, int q) {
    const int64_t behind = t.position[q] - tile.first + 1;
    return !t.a->is_causal || behind > tile.count ? tile.count : behind < 0 ? 0 : int(behind);
}

// What the lanes of a product of a query and a key sum up: products[query][key % VW], of NUM_KEYS keys of a tile.
template <int NUM_QUERIES, int NUM_KEYS>
INLINE void multiply_keys(const Tile &t, const KeyTile &tile, int begin, int first, vf (*products)[VW]) {
    const int64_t dim = t.a->head_dim, whole = dim / VW * VW;
    const float *const *query = t.query + begin, *const *keys = tile.keys + first;
    vf sums[NUM_KEYS][NUM_QUERIES] = {};
    auto add = [&](int64_t d, auto load_from) {
        vf queries[NUM_QUERIES];
#pragma GCC unroll 8
        for (int q = 0; q < NUM_QUERIES; q++) queries[q] = load_from(query[q] + d);
#pragma GCC unroll 8
        for (int i = 0; i < NUM_KEYS; i++) {
            vf key = load_from(keys[i] + t.key_offset + d);
#pragma GCC unroll 8
            for (int q = 0; q < NUM_QUERIES; q++) sums[i][q] += queries[q] * key;
        }
    };
    for (int64_t d = 0; d < whole; d += VW) add(d, [](const float *p) { return load(p); });
    if (whole < dim) add(whole, [&](const float *p) { return load_some(p, dim - whole); });
#pragma GCC unroll 8
    for (int i = 0; i < NUM_KEYS; i++)
#pragma GCC unroll 8
        for (int q = 0; q < NUM_QUERIES; q++) products[begin + q][(first + i) % VW] = sums[i][q];
}

template <int NUM_QUERIES>
static void multiply_queries(const Tile &t, const KeyTile &tile, int begin, int first, int end, vf (*products)[VW]) {
    constexpr int KEYS_AT_ONCE = VW == 16 ? 4 : 2;
    for (; first + KEYS_AT_ONCE <= end; first += KEYS_AT_ONCE)
        multiply_keys<NUM_QUERIES, KEYS_AT_ONCE>(t, tile, begin, first, products);
    for (; first < end; first++) multiply_keys<NUM_QUERIES, 1>(t, tile, begin, first, products);
}

// Number d of key k of the tile goes to columns[d * KEYS + k]; what fills up whole vectors is 0.
static void turn_keys(const KeyTile &tile, int64_t key_offset, int64_t dim, float *columns) {
    for (int first = 0; first < tile.count; first += VW) {
        const int count = tile.count - first < VW ? tile.count - first : VW;
        for (int i = 0; i < count; i++) prefetch_row(tile.values[first + i] + key_offset, dim);
        for (int64_t d = 0; d < dim; d += VW) {
            vf rows[VW] = {};
            for (int i = 0; i < count; i++) {
                const float *key = tile.keys[first + i] + key_offset + d;
                rows[i] = d + VW <= dim ? load(key) : load_some(key, dim - d);
            }
            turn(rows);
            for (int i = 0; i < VW; i++) store(columns + (d + i) * KEYS + first, rows[i]);
        }
    }
}

// For a vector of keys in columns, what lanes [FIRST, FIRST + COUNT) of a vector sum up in `multiply_keys`, in the order in
// which `sums_of_lanes` adds them: both give the same bits. More keys at once do not fit into the registers.
template <int FIRST, int COUNT, int NUM_QUERIES>
INLINE void sum_lanes(const float *const *query, int64_t dim, const float *columns, vf *sums) {
    if constexpr (COUNT == 1) {
        for (int64_t d = FIRST; d < dim; d += VW) {
            const vf keys = load(columns + d * KEYS);
#pragma GCC unroll 8
            for (int q = 0; q < NUM_QUERIES; q++) sums[q] += splat(query[q][d]) * keys;
        }
    } else {
        vf others[NUM_QUERIES] = {};
        sum_lanes<FIRST, COUNT / 2, NUM_QUERIES>(query, dim, columns, sums);
        sum_lanes<FIRST + COUNT / 2, COUNT / 2, NUM_QUERIES>(query, dim, columns, others);
#pragma GCC unroll 8
        for (int q = 0; q < NUM_QUERIES; q++) sums[q] += others[q];
    }
}

template <int NUM_QUERIES>
static void score_columns(Tile &t, const KeyTile &tile, const float *columns, int begin) {
    const int seen = num_seen(t, tile, begin + NUM_QUERIES - 1);
    for (int k = 0; k < seen; k += VW) {
        vf sums[NUM_QUERIES] = {};
        sum_lanes<0, VW, NUM_QUERIES>(t.query + begin, t.a->head_dim, columns + k, sums);
#pragma GCC unroll 8
        for (int q = 0; q < NUM_QUERIES; q++) store(t.scores[begin + q] + k, sums[q] * t.a->scale);
    }
}

INLINE void score_turned(Tile &t, const KeyTile &tile, float *columns) {
    turn_keys(tile, t.key_offset, t.a->head_dim, columns);
    int q = 0;
    for (; q + 4 <= t.num_queries; q += 4) score_columns<4>(t, tile, columns, q);
    for (; q < t.num_queries; q++) score_columns<1>(t, tile, columns, q);
}

INLINE void multiply_few(const Tile &t, const KeyTile &tile, int first, int end, vf (*products)[VW]) {
    int q = 0;
    for (; q + 4 <= t.num_queries; q += 4) multiply_queries<4>(t, tile, q, first, end, products);
    switch (t.num_queries - q) {
        case 1: return multiply_queries<1>(t, tile, q, first, end, products);
        case 2: return multiply_queries<2>(t, tile, q, first, end, products);
        case 3: return multiply_queries<3>(t, tile, q, first, end, products);
    }
}

// Scores of the `count` keys from `first` on, a vector at most, of their products.
INLINE void score_few(Tile &t, int first, int count, vf (*products)[VW]) {
    for (int q = 0; q < t.num_queries; q++) {
        for (int i = count; i < VW; i++) products[q][i] = vf{};
        store(t.scores[q] + first, sums_of_lanes(products[q]) * t.a->scale);
    }
}

// Soft cap, bias, and what a query does not see.
INLINE void edit_scores(Tile &t, const KeyTile &tile) {
    const Attention &a = *t.a;
    for (int q = 0; q < t.num_queries; q++) {
        float *scores = t.scores[q];
        const int seen = num_seen(t, tile, q);
        if (a.soft_cap > 0)
            for (int k = 0; k < seen; k += VW)
                store(scores + k, vtanh(load(scores + k) * (1.0f / a.soft_cap)) * a.soft_cap);
        if (a.bias) {
            const float *row = a.bias + t.head[q] * (2 * a.max_distance + 1) + a.max_distance;
            for (int k = 0; k < seen; k++) {
                int64_t distance = tile.first + k - t.position[q];
                if (distance > a.max_distance) distance = a.max_distance;
                if (distance < -a.max_distance) distance = -a.max_distance;
                scores[k] += row[distance];
            }
        }
        const int64_t left_out = a.is_causal && a.window > 0 ? t.position[q] - tile.first - a.window + 1 : 0;
        for (int k = 0; k < left_out && k < tile.padded; k += VW)
            store(scores + k, lane_numbers(k) < splat(float(left_out)) ? splat(HIDDEN) : load(scores + k));
        for (int k = seen / VW * VW; k < tile.padded; k += VW)
            store(scores + k, lane_numbers(k) < splat(float(seen)) ? load(scores + k) : splat(HIDDEN));
    }
}

INLINE void scale_row(float *to, const float *from, int64_t size, float factor) {
    int64_t at = 0;
    for (; at + VW <= size; at += VW) store(to + at, load(from + at) * factor);
    for (; at < size; at++) to[at] = from[at] * factor;
}

// Scores become weights; sums so far are brought to the new maximum.
INLINE void soften(Tile &t, int padded) {
    const int64_t dim = t.a->head_dim;
    for (int q = 0; q < t.num_queries; q++) {
        vf most = load(t.scores[q]);
        for (int k = VW; k < padded; k += VW) most = vmax(most, load(t.scores[q] + k));
        float largest = max_of(most);
        if (largest > t.most[q]) {
            float factor = vexp(splat(t.most[q] - largest))[0];
            t.most[q] = largest;
            t.sum[q] *= factor;
            scale_row(t.sums + q * dim, t.sums + q * dim, dim, factor);
        }
        vf total = {};
        for (int k = 0; k < padded; k += VW) {
            vf weights = vexp(load(t.scores[q] + k) - t.most[q]);
            store(t.scores[q] + k, weights);
            total += weights;
        }
        t.sum[q] += sum_of(total);
    }
}

template <int TOGETHER, int VECTORS>
INLINE void add_values_of(Tile &t, const KeyTile &tile, int q, int64_t d, int first, int end) {
    const int64_t dim = t.a->head_dim, from = t.key_offset + d;
    const float *scores = t.scores[q];
    float *sums = t.sums + q * dim + d;
    const int seen = num_seen(t, tile, q + TOGETHER - 1);
    if (seen < end) end = seen;
    vf acc[TOGETHER][VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < TOGETHER; i++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) acc[i][v] = load(sums + i * dim + v * VW);
    for (int k = first; k < end; k++) {
        const float *value = tile.values[k] + from;
        vf values[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) values[v] = load(value + v * VW);
#pragma GCC unroll 8
        for (int i = 0; i < TOGETHER; i++) {
            vf weight = splat(scores[i * KEYS + k]);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) acc[i][v] += weight * values[v];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < TOGETHER; i++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) store(sums + i * dim + v * VW, acc[i][v]);
}

template <int TOGETHER>
static void add_values_to(Tile &t, const KeyTile &tile, int q, int first, int end) {
    const int64_t dim = t.a->head_dim, whole = dim / VW * VW;
    constexpr int WIDE = VW == 16 ? 4 : 2;
    int64_t d = 0;
    for (; d + WIDE * VW <= whole; d += WIDE * VW) add_values_of<TOGETHER, WIDE>(t, tile, q, d, first, end);
    for (; d < whole; d += VW) add_values_of<TOGETHER, 1>(t, tile, q, d, first, end);
    for (int i = 0; i < TOGETHER; i++)
        for (d = whole; d < dim; d++)
            for (int k = first; k < end; k++)
                t.sums[(q + i) * dim + d] += t.scores[q + i][k] * tile.values[k][t.key_offset + d];
}

// Of the keys [first, end) of the tile.
INLINE void add_values(Tile &t, const KeyTile &tile, int first, int end) {
    int q = 0;
    for (; q + 4 <= t.num_queries; q += 4) add_values_to<4>(t, tile, q, first, end);
    switch (t.num_queries - q) {
        case 1: return add_values_to<1>(t, tile, q, first, end);
        case 2: return add_values_to<2>(t, tile, q, first, end);
        case 3: return add_values_to<3>(t, tile, q, first, end);
    }
}

// Where `count` keys and values from position `first` on lie; values may be null.
INLINE void find_rows(
    const Attention &a, const Segment &segment, int64_t head, int64_t first, int count, const float **keys,
    const float **values) {
    if (count == 0) return;
    const float *key = a.keys + head * a.head_dim;
    const int64_t to_value = a.values - a.keys;
    const int32_t *block = a.tables ? a.tables + segment.row * a.table_stride + first / a.block_size : nullptr;
    int64_t offset = block ? first % a.block_size : 0;
    int64_t place = (block ? *block * a.block_stride : (segment.begin + first) * a.token_stride) + offset * a.token_stride;
    for (int k = 0; k < count; k++, offset++, place += a.token_stride) {
        if (block && offset == a.block_size) offset = 0, place = *++block * a.block_stride;
        keys[k] = key + place;
        if (values) values[k] = key + place + to_value;
    }
}

// What a task works on: tile `first_query / QUERIES` of the queries of every key head in [head, end_head).
struct Task {
    const Attention *a;
    Segment segment;
    int64_t first_query, head, end_head;
};

static void start(Tile &t, const Task &task, int64_t head, float *sums) {
    const Attention &a = *task.a;
    const int64_t shared = a.num_heads / a.num_kv_heads, num_queries = task.segment.end - task.segment.begin;
    const int64_t left = num_queries * shared - task.first_query;
    t.a = &a;
    t.num_queries = int(left < QUERIES ? left : QUERIES);
    t.key_offset = (head - task.head) * a.head_dim;
    t.sums = sums;
    memset(sums, 0, size_t(t.num_queries * a.head_dim) * sizeof(float));
    for (int q = 0; q < t.num_queries; q++) {
        int64_t token = (task.first_query + q) / shared;
        t.head[q] = head * shared + (task.first_query + q) % shared;
        t.query[q] = a.query + (task.segment.begin + token) * a.query_stride + t.head[q] * a.head_dim;
        t.position[q] = task.segment.context - num_queries + token;
        t.most[q] = HIDDEN, t.sum[q] = 0;
    }
}

static void finish(const Tile &t, const Task &task) {
    const Attention &a = *t.a;
    const int64_t shared = a.num_heads / a.num_kv_heads;
    for (int q = 0; q < t.num_queries; q++) {
        int64_t token = task.segment.begin + (task.first_query + q) / shared;
        float *out = a.output + (token * a.num_heads + t.head[q]) * a.head_dim, inverse = 1.0f / t.sum[q];
        scale_row(out, t.sums + q * a.head_dim, a.head_dim, inverse);
    }
}

struct Scratch {
    Tile tiles[HEADS];
    KeyTile keys;
    vf products[HEADS][TURNED][VW];  // of few queries with some keys
    float *floats;                   // sums of every head
    float *columns;                  // [head_dim, filled up to whole vectors][KEYS]
};

// Adds the tile to the sums of every head. The next keys are asked for while the values are used.
static void attend_many(Scratch &scratch, int num_heads) {
    const KeyTile &tile = scratch.keys;
    for (int h = 0; h < num_heads; h++) {
        Tile &t = scratch.tiles[h];
        score_turned(t, tile, scratch.columns);
        edit_scores(t, tile);
        soften(t, tile.padded);
        for (int k = 0; k < tile.next_count; k++) prefetch_row(tile.next_keys[k] + t.key_offset, t.a->head_dim);
        add_values(t, tile, 0, tile.count);
    }
}

static void attend_few(Scratch &scratch, int num_heads) {
    const KeyTile &tile = scratch.keys;
    const int64_t size = num_heads * scratch.tiles[0].a->head_dim;
    const int64_t ahead = size < AHEAD ? AHEAD / size : 1;
    const int64_t numbers = TOGETHER * scratch.tiles[0].num_queries;
    const int together = int(size < numbers ? numbers / size : 1);
    for (int first = 0; first < tile.count; first += VW) {
        const int count = tile.count - first < VW ? tile.count - first : VW, end = first + count;
        for (int k = first; k < end; k += together) {
            const int stop = end - k < together ? end : k + together;
            for (int i = k; i < stop; i++)
                prefetch_row_of(tile.keys, tile.count, tile.values, tile.count, i + ahead, size);
            for (int h = 0; h < num_heads; h++) multiply_few(scratch.tiles[h], tile, k, stop, scratch.products[h]);
        }
        for (int h = 0; h < num_heads; h++) score_few(scratch.tiles[h], first, count, scratch.products[h]);
    }
    for (int h = 0; h < num_heads; h++) {
        edit_scores(scratch.tiles[h], tile);
        soften(scratch.tiles[h], tile.padded);
    }
    for (int k = 0; k < tile.count; k += together) {
        const int stop = tile.count - k < together ? tile.count : k + together;
        for (int i = k; i < stop; i++)
            prefetch_row_of(tile.values, tile.count, tile.next_keys, tile.next_count, i + ahead, size);
        for (int h = 0; h < num_heads; h++) add_values(scratch.tiles[h], tile, k, stop);
    }
}

// The keys that some query of a task sees: [from, to).
static void find_range(const Task &task, int64_t &from, int64_t &to) {
    const Attention &a = *task.a;
    from = 0, to = task.segment.context;
    if (!a.is_causal) return;
    const int64_t shared = a.num_heads / a.num_kv_heads, num_queries = task.segment.end - task.segment.begin;
    const int64_t left = num_queries * shared - task.first_query, count = left < QUERIES ? left : QUERIES;
    const int64_t begin = task.segment.context - num_queries;  // position of the segment's first query
    to = begin + (task.first_query + count - 1) / shared + 1;
    const int64_t hidden = begin + task.first_query / shared - a.window + 1;
    if (a.window > 0 && hidden > 0) from = hidden / KEYS * KEYS;
}

// next: what this thread computes after it, or null.
static void run(const Task &task, const Task *next, Scratch &scratch) {
    const Attention &a = *task.a;
    const int num_heads = int(task.end_head - task.head);
    for (int h = 0; h < num_heads; h++)
        start(scratch.tiles[h], task, task.head + h, scratch.floats + h * QUERIES * a.head_dim);
    int64_t from, to, next_from = 0, next_to = 0;
    find_range(task, from, to);
    if (next) find_range(*next, next_from, next_to);
    KeyTile &tile = scratch.keys;
    auto find = [&](const Task &of, int64_t first, int64_t end, const float **keys, const float **values) {
        const int count = int(end - first < KEYS ? end - first : KEYS);
        find_rows(a, of.segment, of.head, first, count, keys, values);
        return count;
    };
    for (int64_t first = from; first < to; first += KEYS) {
        tile.first = first;
        tile.count = find(task, first, to, tile.keys, tile.values);
        tile.padded = (tile.count + VW - 1) / VW * VW;
        if (first + KEYS < to)
            tile.next_count = find(task, first + KEYS, to, tile.next_keys, nullptr);
        else
            tile.next_count = next ? find(*next, next_from, next_to, tile.next_keys, nullptr) : 0;
        if (scratch.tiles[0].num_queries < TURNED)
            attend_few(scratch, num_heads);
        else
            attend_many(scratch, num_heads);
    }
    for (int h = 0; h < num_heads; h++) finish(scratch.tiles[h], task);
}

struct Attending {
    const Attention *a;
    int64_t heads_per_task, head_groups;
};

static int64_t query_tiles(const Attention &a, const Segment &segment) {
    int64_t queries = (segment.end - segment.begin) * (a.num_heads / a.num_kv_heads);
    return (queries + QUERIES - 1) / QUERIES;
}

// Tasks are numbered segment by segment, group of heads by group, tile by tile. This has those from `number` to `end`.
struct Tasks {
    const Attending &job;
    int64_t number, end;
    int64_t segment = 0, first = 0;  // `first` is the number of the segment's first task

    bool read(Task &task) {
        if (number >= end) return false;
        const Attention &a = *job.a;
        int64_t tiles;
        while (tiles = query_tiles(a, a.segments[segment]), number >= first + tiles * job.head_groups)
            first += tiles * job.head_groups, segment++;
        const int64_t i = number++ - first, head = i / tiles * job.heads_per_task;
        const int64_t end_head = head + job.heads_per_task;
        task = {&a, a.segments[segment], i % tiles * QUERIES, head, end_head < a.num_kv_heads ? end_head : a.num_kv_heads};
        return true;
    }
};

static void attend_tasks(const void *arg, int64_t begin, int64_t end) {
    const Attending &job = *static_cast<const Attending *>(arg);
    const Attention &a = *job.a;
    static thread_local Buffer<Scratch> memory;
    static thread_local Buffer<float> buffer;
    Scratch &scratch = *memory.of(1);
    const int64_t num_sums = HEADS * QUERIES * a.head_dim;
    scratch.floats = buffer.of(num_sums + (a.head_dim + VW) * KEYS);
    scratch.columns = scratch.floats + num_sums;
    Tasks tasks = {job, begin, end};
    Task task, next;
    bool is_next = tasks.read(next);
    while (is_next) {
        task = next;
        is_next = tasks.read(next);
        run(task, is_next ? &next : nullptr, scratch);
    }
}

// A task takes as many heads as there are, if the threads have enough tasks so.
static void attend(const Attention &a, int num_threads) {
    int64_t tiles = 0, work = 0;
    for (int64_t s = 0; s < a.num_segments; s++) {
        tiles += query_tiles(a, a.segments[s]);
        work += (a.segments[s].end - a.segments[s].begin) * a.segments[s].context;
    }
    if (work * a.num_heads * a.head_dim < 100000) num_threads = 1;
    int64_t groups = tiles >= 4 * num_threads ? 1 : (4 * num_threads + tiles - 1) / (tiles > 0 ? tiles : 1);
    if (num_threads == 1) groups = 1;
    if (groups > a.num_kv_heads) groups = a.num_kv_heads;
    int64_t heads = (a.num_kv_heads + groups - 1) / groups;
    if (heads > HEADS) heads = HEADS;
    Attending job = {&a, heads, (a.num_kv_heads + heads - 1) / heads};
    int64_t count = tiles * job.head_groups, grain = count / (16 * num_threads);
    pool_run(attend_tasks, &job, count, grain > 1 ? grain : 1, num_threads);
}
