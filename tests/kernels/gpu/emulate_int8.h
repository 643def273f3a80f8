// What the kernels of int8 activations need beyond emulate.h: whole clusters at a time, each block with shared memory
// of its own, which lies in `shared` while the block has its turn; copies and products are done when they are asked for.
#include <algorithm>

typedef uint64_t u64;
struct int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
static int2 make_int2(int x, int y) { return {x, y}; }
static uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
template <class T> static T max(T a, T b) { return a < b ? b : a; }
using std::fabs;

static void await_earlier() {}
static void let_next_begin() {}
static uint4 fresh16(const void *p) { return load16(p); }
template <class T> static T fresh(const T *p) { return *p; }
static float divided(float a, float b) { return a / b; }
static float clamped(float v, float most) { return std::fmin(std::fmax(v, -most), most); }
static u32 larger_pair(u32 a, u32 b) { return max(a & 0xFFFF, b & 0xFFFF) | max(a >> 16, b >> 16) << 16; }
static int byte_sum(u32 bytes, int sum) { for (int i = 0; i < 4; i++) sum += (signed char)(bytes >> 8 * i); return sum; }
static int count_bits(u32 v) { return __builtin_popcount(v); }

// A warp's lanes lay down a value each, and go on when all have.
struct Gathering { u32 v[2][32]; int count, turn; };
static std::vector<Gathering> gatherings;
static const u32 *together(u32 v) {
    Gathering &w = gatherings[current / 32];
    int turn = w.turn;
    w.v[turn & 1][current % 32] = v;
    if (++w.count == 32) w.count = 0, w.turn++;
    while (w.turn == turn) yield();
    threadIdx.x = current % threads;
    return w.v[turn & 1];
}
static u32 warp_max(u32 v) { const u32 *all = together(v); return *std::max_element(all, all + 32); }
static int warp_sum(int v) { const u32 *all = together(v); u32 s = 0; for (int i = 0; i < 32; i++) s += all[i]; return s; }
static int warp_prefix(int v) {
    const u32 *all = together(v);
    u32 s = 0;
    for (int i = 0; i <= current % 32; i++) s += all[i];
    return s;
}
static int from_lane_number(int v, int lane) { return together(v)[lane]; }
static void pause() { yield(); threadIdx.x = current % threads; }
static u32 counted(const u32 *count) { return *(volatile const u32 *)count; }
static void count_row(u32 *count) { ++*count; }
static void between_engines() {}
static u32 exchange(u32 v, int mask) { return together(v)[current % 32 ^ mask]; }
static void __syncwarp() { together(0); }

// E4M3: steps of 2^-9 below 2^-6, else of an eighth of the power of two below; halves to even.
static u32 float8(float v) {
    u32 sign = std::signbit(v) ? 0x80 : 0;
    if (std::isnan(v)) return 0x7F;
    float size = std::fmin(std::fabs(v), 448);
    int e = size < 0.015625f ? -6 : std::ilogb(size);
    int steps = (int)std::nearbyint(std::ldexp(size, 3 - e));  // 8 to 16, or less where e is -6
    return sign | (u32)(steps + 8 * (e + 6));
}
static u32 float8_pair(float low, float high) { return float8(low) | float8(high) << 8; }
static void atomicMax(u32 *p, u32 v) { if (*p < v) *p = v; }
// mma.m16n8k32 of bytes: lane 4 g + t holds of A rows g and g + 8, columns 4 t to 4 t + 3 and those plus 16.
struct Bytes { u32 a[32][4], b[32][2]; int count, turn, d[32][4]; };
static std::vector<Bytes> byte_warps(64);
static void multiply_bytes(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    Bytes &w = byte_warps[current / 32];
    int lane = current % 32, turn = w.turn;
    u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
    memcpy(w.a[lane], a, 16), memcpy(w.b[lane], b, 8);
    if (++w.count == 32) {
        for (int l = 0; l < 32; l++)
            for (int e = 0; e < 4; e++) {
                int row = l / 4 + 8 * (e / 2), column = 2 * (l % 4) + e % 2, sum = 0;
                for (int k = 0; k < 32; k++) {
                    u32 left = w.a[row % 8 * 4 + k % 16 / 4][row / 8 + 2 * (k / 16)], right = w.b[column * 4 + k % 16 / 4][k / 16];
                    sum += (int)(left >> 8 * (k % 4) & 0xFF) * (signed char)(right >> 8 * (k % 4));
                }
                w.d[l][e] = sum;
            }
        w.count = 0, w.turn++;
    }
    while (w.turn == turn) yield();
    threadIdx.x = current % threads;
    for (int e = 0; e < 4; e++) d[e] += w.d[lane][e];
}
static void atomicOr(u32 *p, u32 v) { *p |= v; }
static void atomicAdd(int *p, int v) { *p += v; }

#ifdef BN
#define KERNEL_ARGUMENT const
struct alignas(64) Map { const u8 *from; u64 rows, columns, tall, rest[12]; };
constexpr int LARGEST = 1 << 18;
static std::vector<std::vector<u8>> memories;  // of the blocks that do not have their turn
static int cluster;
static int own() { return current / threads; }
static u32 shared_address(const void *p) { return (u32)((const u8 *)p - (const u8 *)shared) + 48; }  // not at 1,024
static u8 *place(const void *p, int rank) {
    long at = (const u8 *)p - (const u8 *)shared;
    return rank == own() ? (u8 *)p : memories[rank].data() + at;
}
static u32 cluster_rank() { return own(); }
static int at_cluster, cluster_turn;
static void cluster_barrier() {
    int turn = cluster_turn;
    if (++at_cluster == threads * cluster) at_cluster = 0, cluster_turn++;
    while (cluster_turn == turn) yield();
    threadIdx.x = current % threads;
}
static int4 load_from(const int *p, u32 rank) { int4 v; memcpy(&v, place(p, rank), 16); return v; }
static u32 load_word(const u32 *p, u32 rank) { u32 v; memcpy(&v, place(p, rank), 4); return v; }
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
static void expect(u64 *p, u32 bytes) { ((Barrier *)p)->bytes += bytes; arrive(p); }
static void await(u64 *p, u32 phase) {
    while (((Barrier *)p)->phase == (int)phase) yield();
    threadIdx.x = current % threads;
}
static void copy_tile(void *to, const Map &map, int column, int row, u64 *barrier, u16 blocks) {
    for (int rank = 0; rank < cluster; rank++) {
        if (!(blocks >> rank & 1)) continue;
        u8 *tile = place(to, rank);
        if (((u8 *)to - (u8 *)shared + 48) % 1024) __builtin_trap();
        for (u64 r = 0; r < map.tall; r++)
            for (int c = 0; c < 128; c++) {
                bool inside = row + r < map.rows && column + c < map.columns;
                tile[r * 128 + ((c >> 4 ^ r & 7) << 4 | c & 15)] = inside ? map.from[(row + r) * map.columns + column + c] : 0;
            }
        Barrier *b = (Barrier *)place(barrier, rank);
        b->bytes -= 128 * map.tall, settled(b);
    }
}
static void fetch_tile(const Map &, int, int) {}
static void copy_tile(void *to, const Map &map, int column, int row, u64 *barrier) {
    copy_tile(to, map, column, row, barrier, 1 << own());
}
template <int N> static void hold_registers() {}
template <int N> static void give_registers() {}
static u64 describe(const void *tile) { return (u64)tile; }
static void begin_products() {}
static void end_products() {}
template <int LEFT> static void await_products() {}
static void settle(int (&)[BN / 8][4]) {}
static void multiply_tiles(int (&d)[BN / 8][4], u64 left, u64 right, int step) {
    const signed char *x = (const signed char *)left;
    const u8 *w = (const u8 *)right;
    int lane = current % 32, warp = current % threads / 32 % 4;
    for (int j = 0; j < BN / 8; j++)
        for (int e = 0; e < 4; e++) {
            int m = warp * 16 + lane / 4 + e / 2 * 8, n = j * 8 + lane % 4 * 2 + e % 2;
            for (int k = step * 32; k < step * 32 + 32; k++)
                d[j][e] += x[m * 128 + ((k >> 4 ^ m & 7) << 4 | k & 15)] * w[n * 128 + ((k >> 4 ^ n & 7) << 4 | k & 15)];
        }
}

template <class Body> static void run_clusters(int blocks, int block_threads, int size, Body body) {
    static Body *entry;
    entry = &body;
    threads = block_threads, cluster = size, gridDim = {blocks, 1, 1};
    for (int first = 0; first < blocks; first += size) {
        memories.assign(size, std::vector<u8>(LARGEST, 0xFF));
        fibers.assign(threads * size, Fiber{});
        gatherings.assign(threads * size / 32, Gathering{});
        memset(meetings, 0, sizeof meetings);
        at_cluster = arrived_at_barrier = 0;
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
                memcpy(shared, memories[rank].data(), LARGEST);
                for (current = rank * threads; current < (rank + 1) * threads; current++) {
                    if (fibers[current].done) continue;
                    left++, threadIdx = {current % threads, 0, 0}, blockIdx = {first + rank, 0, 0};
                    swapcontext(&scheduler, &fibers[current].context);
                }
                memcpy(memories[rank].data(), shared, LARGEST);
            }
        }
    }
}
#endif
