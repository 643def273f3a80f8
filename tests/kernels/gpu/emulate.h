// Runs a CUDA kernel on the CPU: the threads of a block are fibers that take turns, a barrier waits for all of them,
// and a warp's matrix product waits for its 32 lanes. Blocks run one after the other, shared memory starts as NaNs.
#include <ucontext.h>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define EMULATED
#define DEVICE static inline
#define __global__
#define __shared__
#define __launch_bounds__(...)
typedef uint32_t u32;
typedef uint16_t u16;
typedef uint8_t u8;
struct uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct dim3 { int x, y, z; };
static uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
template <class T> static T min(T a, T b) { return a < b ? a : b; }

extern "C" { uint4 shared[1 << 14]; }
static dim3 threadIdx, blockIdx, gridDim;
static ucontext_t scheduler;
struct Fiber { ucontext_t context; bool done; std::vector<char> stack; };
static std::vector<Fiber> fibers;
static int current, threads, arrived_at_barrier, barrier_turn;

static void yield() {
    int self = current;
    swapcontext(&fibers[self].context, &scheduler);
}
static void __syncthreads() {
    int turn = barrier_turn;
    if (++arrived_at_barrier == threads) arrived_at_barrier = 0, barrier_turn++;
    while (barrier_turn == turn) yield();
    threadIdx.x = current;
}
static void __threadfence() {}
static u32 atomicAdd(u32 *p, u32 v) { u32 old = *p; *p += v; return old; }

static float bits_float(u32 v) { float f; memcpy(&f, &v, 4); return f; }
static u32 float_bits(float f) { u32 v; memcpy(&v, &f, 4); return v; }
static u32 permute(u32 a, u32 b, u32 s) {
    uint64_t both = (uint64_t)b << 32 | a;
    u32 out = 0;
    for (int i = 0; i < 4; i++) out |= (u32)(both >> 8 * (s >> 4 * i & 7) & 0xFF) << 8 * i;
    return out;
}
static uint4 load16(const void *p) { if ((uintptr_t)p % 16) __builtin_trap(); uint4 v; memcpy(&v, p, 16); return v; }
static uint2 load8(const void *p) { if ((uintptr_t)p % 8) __builtin_trap(); uint2 v; memcpy(&v, p, 8); return v; }
static u32 load4(const void *p) { if ((uintptr_t)p % 4) __builtin_trap(); u32 v; memcpy(&v, p, 4); return v; }
static void copy_behind(void *to, const void *from) { *(uint4 *)to = load16(from); }
static void end_copies() {}
static u32 kept(u32 v) { return v; }
static u32 both_low(u32 v) { return (v & 0xFFFF) * 0x10001; }
static u32 both_high(u32 v) { return (v >> 16) * 0x10001; }
static const u32 SHARED_BEGINS = 1024;
static u32 shared_place(const void *p) { return (u32)((const char *)p - (const char *)shared) + SHARED_BEGINS; }
static u32 shared_word(u32 at) { u32 v; memcpy(&v, (const char *)shared + at - SHARED_BEGINS, 4); return v; }
static uint4 shared_if(bool wanted, u32 at) {
    return wanted ? *(const uint4 *)((const char *)shared + at - SHARED_BEGINS) : make_uint4(0, 0, 0, 0);
}
static void prefetch(const void *) {}
static void previous_done() {}
static void next_may_begin() {}
template <int N> static void copies_left() {}
static float load_uncached(const float *p) { return *p; }
static u32 under_exponent(u32 bits, u32 mask, u32 exponent) { return (bits & mask) | exponent; }

static float widen_f16(u32 low) { u16 h = low; _Float16 f; memcpy(&f, &h, 2); return f; }
static float widen(u32 low) { return HALF ? widen_f16(low) : bits_float(low << 16); }
static u16 narrow(float f) {
    if (HALF) { _Float16 h = (_Float16)f; u16 v; memcpy(&v, &h, 2); return v; }
    u32 v = float_bits(f);
    return std::isnan(f) ? 0x7FC0 : (v + 0x7FFF + (v >> 16 & 1)) >> 16;
}
static u32 round_pair(float low, float high) { return narrow(low) | (u32)narrow(high) << 16; }
static u32 add_pair(u32 a, u32 b) {
    return round_pair(widen(a & 0xFFFF) + widen(b & 0xFFFF), widen(a >> 16) + widen(b >> 16));
}
static u32 scale_by(u32 a, u32 b) {
    return round_pair(widen(a & 0xFFFF) * widen(b & 0xFFFF), widen(a >> 16) * widen(b >> 16));
}
static u32 multiply_add(u32 a, u32 b, u32 c) {
    return round_pair(widen(a & 0xFFFF) * widen(b & 0xFFFF) + widen(c & 0xFFFF), widen(a >> 16) * widen(b >> 16) + widen(c >> 16));
}

// mma.m16n8k16: lane 4 g + t holds A rows g and g + 8, columns 2 t, 2 t + 1 and those plus 8; B the same of column g.
struct Warp { u32 a[32][4], b[32][2]; float d[32][4]; int count, turn; };
static std::vector<Warp> warps;
static void multiply(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    Warp &w = warps[current / 32];
    int lane = current % 32, turn = w.turn;
    w.a[lane][0] = a0, w.a[lane][1] = a1, w.a[lane][2] = a2, w.a[lane][3] = a3, w.b[lane][0] = b0, w.b[lane][1] = b1;
    if (++w.count == 32) {
        for (int l = 0; l < 32; l++)
            for (int e = 0; e < 4; e++) {
                int row = l / 4 + 8 * (e / 2), column = 2 * (l % 4) + e % 2;
                double sum = 0;
                for (int k = 0; k < 16; k++) {
                    u32 a = w.a[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)], b = w.b[column * 4 + k % 8 / 2][k / 8];
                    sum += (double)widen(k % 2 ? a >> 16 : a & 0xFFFF) * widen(k % 2 ? b >> 16 : b & 0xFFFF);
                }
                w.d[l][e] = sum;
            }
        w.count = 0, w.turn++;
    }
    while (w.turn == turn) yield();
    threadIdx.x = current % threads;
    for (int e = 0; e < 4; e++) d[e] += w.d[lane][e];
}

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
static u32 word_of(u32 v, int lane) { return together(v)[lane]; }
static float from_lane(float v, int flip) { return bits_float(together(float_bits(v))[current % 32 ^ flip]); }
static float multiplied(float a, float b) { volatile float c = a * b; return c; }
static float power_of_two(float v) { return std::exp2(v); }
static float inverse_root(float v) { return 1 / std::sqrt(v); }
static float near_inverse(float v) { return 1 / v; }
static float logistic(float v) { return 1 / (1 + std::exp(-v)); }

template <class Body> static void run_grid(dim3 grid, int block_threads, Body body) {
    static Body *entry;
    entry = &body;
    threads = block_threads, gridDim = grid;
    for (int z = 0; z < grid.z; z++)
        for (int y = 0; y < grid.y; y++)
            for (int x = 0; x < grid.x; x++) {
                blockIdx = {x, y, z};
                memset(shared, 0xFF, sizeof shared);
                fibers.assign(threads, Fiber{});
                warps.assign(threads / 32, Warp{}), gatherings.assign(threads / 32, Gathering{});
                arrived_at_barrier = 0;
                for (current = 0; current < threads; current++) {
                    Fiber &f = fibers[current];
                    f.stack.resize(1 << 16);
                    getcontext(&f.context);
                    f.context.uc_stack.ss_sp = f.stack.data(), f.context.uc_stack.ss_size = f.stack.size();
                    f.context.uc_link = &scheduler;
                    makecontext(&f.context, (void (*)())+[] { (*entry)(); fibers[current].done = true; }, 0);
                }
                for (int left = threads; left;) {
                    left = 0;
                    for (current = 0; current < threads; current++) {
                        if (fibers[current].done) continue;
                        left++, threadIdx = {current, 0, 0};
                        swapcontext(&scheduler, &fibers[current].context);
                    }
                }
            }
}
