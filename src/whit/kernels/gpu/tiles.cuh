// Tiles that another engine copies to shared memory, also for a neighbour in a cluster, as many.cu takes them.
typedef unsigned long long u64;
#include "hopper.cuh"

struct alignas(64) Map {  // CUtensorMap
    u64 opaque[16];
};
#define KERNEL_ARGUMENT const __grid_constant__
DEVICE void prefetch_map(const Map &map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

DEVICE u32 shared_address(const void *p, u32 rank) {  // the same place in another block of the cluster
    u32 at;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(p)), "r"(rank));
    return at;
}
DEVICE u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
DEVICE void cluster_barrier() { asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory"); }
DEVICE void store_to(float4 *p, float4 v, u32 rank) {  // the same place in another block of the cluster
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1,%2,%3,%4};"
                 ::"r"(shared_address(p, rank)), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
// A barrier within a block, of so many threads.
template <int ID, int COUNT> DEVICE void meet() { asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(COUNT) : "memory"); }

// Counts up to `most`, which becomes zero, after what the warp wrote (and a barrier of its lanes).
[[maybe_unused]] DEVICE void count_round(u32 *at, u32 most) {
    asm volatile("red.release.gpu.global.inc.u32 [%0], %1;" ::"l"(at), "r"(most - 1) : "memory");
}
[[maybe_unused]] DEVICE void await_count(const u32 *at, u32 least) {
    u32 found;
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(at) : "memory");
    while (found < least);
}
DEVICE float4 load_sums(const float4 *p) {  // which another multiprocessor wrote
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
    return v;
}

DEVICE void arrive(u64 *barrier, u32 rank) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(shared_address(barrier, rank)) : "memory");
}
DEVICE void expect(u64 *barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
DEVICE void copy_tile(void *to, const Map &map, int column, int row, u64 *barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(shared_address(to)), "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)) : "memory");
}
// To the same place in every block of `blocks` (a bit for each), whose barriers at that place count the bytes.
DEVICE void copy_tile(void *to, const Map &map, int column, int row, u64 *barrier, u16 blocks) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
                 " [%0], [%1, {%2, %3}], [%4], %5;"
                 ::"r"(shared_address(to)), "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(blocks) : "memory");
}

[[maybe_unused]] DEVICE void publish_tiles() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Shared memory's boxes to where a map says; who sends them awaits until all but the last have been read.
[[maybe_unused]] DEVICE void send_box(const Map &map, int column, int row, const void *from) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"
                 ::"l"(&map), "r"(column), "r"(row), "r"(shared_address(from)) : "memory");
}
[[maybe_unused]] DEVICE void end_boxes() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int N> DEVICE void await_boxes() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory"); }
// Four matrices of 8 x 8 pairs of bytes, of which a lane has two numbers of column lane / 4; lane 8 i + r says where row r
// of the i-th is to lie.
[[maybe_unused]] DEVICE void lay_turned(void *row, const u32 (&v)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};"
                 ::"r"(shared_address(row)), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
}

// Where 64 columns of x lie: rows of 128 bytes in the 128-byte swizzle, eights of them 1,024 bytes apart.
DEVICE u64 describe_rows(const void *tile) {
    return (u64)(shared_address(tile) & 0x3FFFF) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
template <int N> DEVICE void products_left() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// The products of step `step` of 16 columns; the first of a row of them (`fresh`) forgets what was there.
DEVICE void multiply_fresh(float (&d)[NT][4], u32 (&a)[4], u64 x, int step, int fresh) {
    asm volatile("{.reg .pred p; setp.eq.s32 p, %" FRESH ", 0;\n"
                 "wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE " {" SUMS "}, {" LEFT "}, " RIGHT ", p, 1, 1, 0;}"
                 : ALL : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x + 2 * step), "r"(fresh));
}
// Those products added to all sums, or only to those of the lower half of the rows.
template <bool LOW> DEVICE void multiply_step(float (&d)[NT][4], u32 (&a)[4], u64 x, int step) {
    if constexpr (!LOW) wide_multiply(d, a[0], a[1], a[2], a[3], x + 2 * step);
#ifdef LOW_SHAPE
    else
        asm volatile("{.reg .pred p; setp.eq.u32 p, 0, 0;\n"
                     "wgmma.mma_async.sync.aligned." LOW_SHAPE ".f32." TYPE "." TYPE " {" LOW_SUMS "}, {" LOW_LEFT "}, " LOW_RIGHT ", p, 1, 1, 0;}"
                     : LOW_ALL : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x + 2 * step));
#endif
}

// A warp's registers from now on: those that it does not need are for others of the block.
template <int COUNT> DEVICE void hold_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT> DEVICE void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }

DEVICE u32 transpose(u32 v) {  // eight rows of a warp's lanes become eight columns
    u32 d;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(v));
    return d;
}
DEVICE u32 exchange(u32 v, int flip) { return __shfl_xor_sync(0xFFFFFFFFu, v, flip); }
DEVICE float of_lane(float v, int lane) { return __shfl_sync(0xFFFFFFFFu, v, lane); }
DEVICE int uniform(int v) { return __shfl_sync(0xFFFFFFFFu, v, 0); }  // the same in all lanes, and known to be
DEVICE u32 load_shared(u32 at) {  // what was written before the first products
    u32 v;
    asm("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at));
    return v;
}
