// What kernels with clusters need beyond emulate.h: whole clusters at a time, each block with shared memory of its own,
// which lies in `shared` while the block has its turn; copies and products are done when they are asked for.
#include <algorithm>

typedef uint64_t u64;
struct int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
static int2 make_int2(int x, int y) { return {x, y}; }
static uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
template <class T> static T max(T a, T b) { return a < b ? b : a; }
using std::fabs;

static u32 exchange(u32 v, int mask) { return together(v)[current % 32 ^ mask]; }
static void __syncwarp() { together(0); }


#define KERNEL_ARGUMENT const
struct alignas(64) Map { const u8 *from; u64 rows, columns, tall, wide, size, rest[10]; };
constexpr int MEMORY = 1 << 18;
static std::vector<std::vector<u8>> memories;  // of the blocks that do not have their turn
static int cluster;
static int own() { return current / threads; }
#ifndef BEGINS_AT
#define BEGINS_AT 48  // shared memory, for kernels that look for a place at 1,024
#endif
static u32 shared_address(const void *p) { return (u32)((const u8 *)p - (const u8 *)shared) + BEGINS_AT; }
static u8 *place(const void *p, int rank) {
    long at = (const u8 *)p - (const u8 *)shared;
    return rank == own() ? (u8 *)p : memories[rank].data() + at;
}
static u32 cluster_rank() { return own(); }
static int at_cluster, cluster_turn;
static std::vector<int> left_turn;  // the turn in which each thread arrived
static void cluster_arrive() {
    left_turn[current] = cluster_turn;
    if (++at_cluster == threads * cluster) at_cluster = 0, cluster_turn++;
}
static void cluster_wait() {
    while (cluster_turn == left_turn[current]) yield();
    threadIdx.x = current % threads;
}
static void cluster_barrier() { cluster_arrive(), cluster_wait(); }
static int4 load_from(const int *p, u32 rank) { int4 v; memcpy(&v, place(p, rank), 16); return v; }
static void store_to(float4 *p, float4 v, u32 rank) { memcpy(place(p, rank), &v, 16); }
static void publish_tiles() {}
struct Meeting { int count, turn; };
static Meeting meetings[8][8];
template <int ID, int COUNT> static void announce() {
    Meeting &m = meetings[own()][ID];
    if (++m.count == COUNT) m.count = 0, m.turn++;
}
template <int ID, int COUNT> static void meet() {
    Meeting &m = meetings[own()][ID];
    int turn = m.turn;
    announce<ID, COUNT>();
    while (m.turn == turn) yield();
    threadIdx.x = current % threads;
}
// The barrier of each block.
static Meeting blocks[8];
static void block_barrier() {
    Meeting &m = blocks[own()];
    int turn = m.turn;
    if (++m.count == threads) m.count = 0, m.turn++;
    while (m.turn == turn) yield();
    threadIdx.x = current % threads;
}
#define __syncthreads block_barrier
// A barrier's eight bytes: arrivals that complete a phase, those still to come, bytes still to come, the phase.
struct Barrier { u8 count, left; int16_t phase; int bytes; };
static void settled(Barrier *b) { if (!b->left && !b->bytes) b->left = b->count, b->phase ^= 1; }
static void make_barrier(u64 *p, u32 count) { *(Barrier *)p = {(u8)count, (u8)count, 0, 0}; }
static void publish_barriers() {}
static void arrive(u64 *p, u32 rank) {
    Barrier *b = (Barrier *)place(p, rank);
    if (!b->left) __builtin_trap();
    b->left--, settled(b);
}
static void arrive(u64 *p) { arrive(p, own()); }
static void expect(u64 *p, u32 bytes, u32 rank) { ((Barrier *)place(p, rank))->bytes += bytes, arrive(p, rank); }
static void expect(u64 *p, u32 bytes) { expect(p, bytes, own()); }
static void await(u64 *p, u32 phase) {
    while (((Barrier *)p)->phase == (int)phase) yield();
    threadIdx.x = current % threads;
}
static void await_sent(u64 *p, u32 phase) { await(p, phase); }
template <class T> static void send(T *p, T v, u32 rank, u64 *barrier) {
    Barrier *b = (Barrier *)place(barrier, rank);
    memcpy(place(p, rank), &v, sizeof v);
    b->bytes -= sizeof v, settled(b);
}
static void join(u32 *p, u32 v, u32 rank, u64 *barrier) { send(p, v | *(u32 *)place(p, rank), rank, barrier); }
// Rows of a tile are 64 or 128 bytes; their units of 16 bytes lie in the swizzle of that width. Others lie as they are.
static void copy_tile(void *to, const Map &map, int column, int row, u64 *barrier, u16 blocks) {
    int bytes = map.wide * map.size, far = bytes == 128 ? 0 : 1, mask = bytes == 64 || bytes == 128 ? bytes / 16 - 1 : 0;
    for (int rank = 0; rank < cluster; rank++) {
        if (!(blocks >> rank & 1)) continue;
        u8 *tile = place(to, rank);
        if (((u8 *)to - (u8 *)shared + BEGINS_AT) % (mask ? 8 * bytes : 128)) __builtin_trap();
        for (u64 r = 0; r < map.tall; r++)
            for (int c = 0; c < bytes; c++) {
                bool inside = row + r < map.rows && column + c / map.size < map.columns;
                int at = r * bytes + (((c >> 4) ^ (r >> far & mask)) << 4 | c & 15);
                tile[at] = inside ? map.from[((row + r) * map.columns + column) * map.size + c] : 0;
            }
        Barrier *b = (Barrier *)place(barrier, rank);
        b->bytes -= bytes * map.tall, settled(b);
    }
}
static void copy_tile(void *to, const Map &map, int column, int row, u64 *barrier) {
    copy_tile(to, map, column, row, barrier, 1 << own());
}

// Boxes of a tile, out of the swizzle of their width.
[[maybe_unused]] static void send_box(const Map &map, int column, int row, const void *from) {
    int bytes = map.wide * map.size, far = bytes == 128 ? 0 : 1, mask = bytes / 16 - 1;
    if (((const u8 *)from - (const u8 *)shared + BEGINS_AT) % (8 * bytes)) __builtin_trap();
    for (u64 r = 0; r < map.tall; r++)
        for (int c = 0; c < bytes; c++) {
            int at = r * bytes + (((c >> 4) ^ (r >> far & mask)) << 4 | c & 15);
            bool inside = row + r < map.rows && column + c / map.size < map.columns;
            if (inside) ((u8 *)map.from)[((row + r) * map.columns + column) * map.size + c] = ((const u8 *)from)[at];
        }
}
[[maybe_unused]] static void end_boxes() {}
template <int LEFT> static void await_boxes() {}

template <class Body> static void run_clusters(int blocks, int block_threads, int size, Body body) {
    static Body *entry;
    entry = &body;
    threads = block_threads, cluster = size, gridDim = {blocks, 1, 1};
    for (int first = 0; first < blocks; first += size) {
        memories.assign(size, std::vector<u8>(MEMORY, 0xFF));
        fibers.assign(threads * size, Fiber{});
        gatherings.assign(threads * size / 32, Gathering{});
        warps.assign(threads * size / 32, Warp{});
        memset(meetings, 0, sizeof meetings);
        at_cluster = arrived_at_barrier = 0, left_turn.assign(threads * size, 0);
        for (current = 0; current < threads * size; current++) {
            Fiber &f = fibers[current];
            f.stack.resize(1 << 16);
            getcontext(&f.context);
            f.context.uc_stack.ss_sp = f.stack.data(), f.context.uc_stack.ss_size = f.stack.size();
            f.context.uc_link = &scheduler;
            makecontext(&f.context, (void (*)())+[] { (*entry)(); fibers[current].done = true; }, 0);
        }
        for (int left = 1; left;) {
            left = 0;
            for (int rank = 0; rank < size; rank++) {
                memcpy(shared, memories[rank].data(), MEMORY);
                for (current = rank * threads; current < (rank + 1) * threads; current++) {
                    if (fibers[current].done) continue;
                    left++, threadIdx = {current % threads, 0, 0}, blockIdx = {first + rank, 0, 0};
                    swapcontext(&scheduler, &fibers[current].context);
                }
                memcpy(memories[rank].data(), shared, MEMORY);
            }
        }
    }
}
