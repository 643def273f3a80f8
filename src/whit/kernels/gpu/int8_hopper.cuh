// Hopper's instructions for int8: products of four warps out of shared memory, and tiles that another engine copies.
//
// wgmma takes 64 rows of the left tile and BN of the right one, 32 columns of each, from shared memory, where both lie
// as rows of 128 bytes in the 128-byte swizzle: 16-byte unit u of row r is at unit u ^ (r & 7).

#include "int8_cluster.cuh"

#ifndef EMULATED
struct alignas(64) Map {  // CUtensorMap
    u64 opaque[16];
};
#define KERNEL_ARGUMENT const __grid_constant__

// What was written to shared memory plainly is to be read by wgmma.
[[maybe_unused]] DEVICE void publish_tiles() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

DEVICE void copy_tile(void *to, const Map &map, int column, int row, u64 *barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(shared_address(to)), "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)) : "memory");
}
// To the same place in every block of `blocks` (a bit for each), whose barriers at that place count the bytes.
[[maybe_unused]] DEVICE void copy_tile(void *to, const Map &map, int column, int row, u64 *barrier, u16 blocks) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
                 " [%0], [%1, {%2, %3}], [%4], %5;"
                 ::"r"(shared_address(to)), "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(blocks) : "memory");
}

// Shared memory's boxes to where a map says; who sends them awaits until all but the last have been read.
[[maybe_unused]] DEVICE void send_box(const Map &map, int column, int row, const void *from) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"
                 ::"l"(&map), "r"(column), "r"(row), "r"(shared_address(from)) : "memory");
}
[[maybe_unused]] DEVICE void end_boxes() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int LEFT> DEVICE void await_boxes() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(LEFT) : "memory"); }
// Four matrices of 8 x 8 pairs of bytes, of which a lane has two numbers of row lane / 4; lane 8 i + r says where row r of
// the i-th is to lie.
[[maybe_unused]] DEVICE void lay_matrices(void *row, const u32 (&v)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};"
                 ::"r"(shared_address(row)), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
}

#define R4 "%0,%1,%2,%3"
#define R8 R4 ",%4,%5,%6,%7"
#define R16 R8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define R32 R16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define R64 R32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define R128 R64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define D1(n) "+r"(d[n][0]), "+r"(d[n][1]), "+r"(d[n][2]), "+r"(d[n][3])
#define D4(n) D1(n), D1(n + 1), D1(n + 2), D1(n + 3)
#define D16(n) D4(n), D4(n + 4), D4(n + 8), D4(n + 12)
#if BN == 8
#define SHAPE "m64n8k32"
#define SUMS R4
#define ENDS "%4, %5"
#define ALL D1(0)
#elif BN == 16
#define SHAPE "m64n16k32"
#define SUMS R8
#define ENDS "%8, %9"
#define ALL D1(0), D1(1)
#elif BN == 32
#define SHAPE "m64n32k32"
#define SUMS R16
#define ENDS "%16, %17"
#define ALL D4(0)
#elif BN == 64
#define SHAPE "m64n64k32"
#define SUMS R32
#define ENDS "%32, %33"
#define ALL D4(0), D4(4)
#elif BN == 128
#define SHAPE "m64n128k32"
#define SUMS R64
#define ENDS "%64, %65"
#define ALL D16(0)
#elif BN == 256
#define SHAPE "m64n256k32"
#define SUMS R128
#define ENDS "%128, %129"
#define ALL D16(0), D16(16)
#endif

#ifdef WEIGHT_LEFT
#define TYPES ".s32.u8.s8"
#else
#define TYPES ".s32.s8.u8"
#endif

// With two times four warps that multiply there are too few registers for all: the other four warps give theirs.
template <int N> DEVICE void hold_registers() {
    if constexpr (N == 2) asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
}
template <int N> DEVICE void give_registers() {
    if constexpr (N == 2) asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
}

// Where a tile lies: groups of 8 rows follow each other after 1,024 bytes.
DEVICE u64 describe(const void *tile) { return (u64)(shared_address(tile) & 0x3FFFF) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62; }
DEVICE void begin_products() {
    __syncwarp();
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
DEVICE void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> DEVICE void await_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }
// d += left (64 rows) right (BN rows)^T, the weight's unsigned and the other signed, over columns [32 step, 32 step + 32) of the tiles.
DEVICE void multiply_tiles(int (&d)[BN / 8][4], u64 left, u64 right, int step) {
    asm volatile("{.reg .pred p; setp.eq.u32 p, 0, 0;\n"
                 "wgmma.mma_async.sync.aligned." SHAPE TYPES " {" SUMS "}, " ENDS ", p;}"
                 : ALL : "l"(left + 2 * step), "l"(right + 2 * step));
}
DEVICE void settle(int (&d)[BN / 8][4]) {  // nothing moves across that reads or makes these
#pragma unroll
    for (int n = 0; n < BN / 8; n++) asm volatile("" : D1(n)::"memory");
}
#endif

// Sixteen bytes of a row of y from `out` on, or as much as there is.
DEVICE void store8(u16 *row, int out, int outs, const u32 (&pairs)[4]) {
    if (outs % 8 == 0 && out < outs) {
        *(uint4 *)(row + out) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (out + i < outs) row[out + i] = (u16)(pairs[i >> 1] >> 16 * (i & 1));
}
