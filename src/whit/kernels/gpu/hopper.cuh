// Hopper's own instructions: matrix products of four warps, and copies that another engine does. Built for sm_90a.
//
// wgmma multiplies 64 outs (16 per warp, as the A of mma.m16n8k16 and in its registers) with 8 NT rows, which lie in
// shared memory as matrices of 8 rows by 16 bytes, 128 bytes each: side by side along rows, 128 NT bytes apart along
// columns. It runs until `await_products`; the registers must be left alone till then.

#define R8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define R16 R8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define R32 R16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define R64 R32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define R128 R64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define D1(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define D2(n) D1(n), D1(n + 1)
#define D4(n) D2(n), D2(n + 2)
#define D8(n) D4(n), D4(n + 4)
#define D16(n) D8(n), D8(n + 8)
#define D32(n) D16(n), D16(n + 16)
#if NT == 2
#define SHAPE "m64n16k16"
#define SUMS R8
#define LEFT "%8,%9,%10,%11"
#define RIGHT "%12"
#define FRESH "13"
#define ALL D2(0)
#elif NT == 4
#define SHAPE "m64n32k16"
#define SUMS R16
#define LEFT "%16,%17,%18,%19"
#define RIGHT "%20"
#define FRESH "21"
#define ALL D4(0)
#elif NT == 8
#define SHAPE "m64n64k16"
#define SUMS R32
#define LEFT "%32,%33,%34,%35"
#define RIGHT "%36"
#define FRESH "37"
#define ALL D8(0)
#elif NT == 16
#define SHAPE "m64n128k16"
#define SUMS R64
#define LEFT "%64,%65,%66,%67"
#define RIGHT "%68"
#define FRESH "69"
#define ALL D16(0)
#define LOW_SHAPE "m64n64k16"
#define LOW_SUMS R32
#define LOW_LEFT "%32,%33,%34,%35"
#define LOW_RIGHT "%36"
#define LOW_ALL D8(0)
#elif NT == 32
#define SHAPE "m64n256k16"
#define SUMS R128
#define LEFT "%128,%129,%130,%131"
#define RIGHT "%132"
#define FRESH "133"
#define ALL D32(0)
#define LOW_SHAPE "m64n128k16"
#define LOW_SUMS R64
#define LOW_LEFT "%64,%65,%66,%67"
#define LOW_RIGHT "%68"
#define LOW_ALL D16(0)
#endif

DEVICE u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

// Where the matrices of 16 columns lie.
DEVICE unsigned long long describe(const uint4 *x) {
    return (shared_address(x) & 0x3FFFF) >> 4 | (unsigned long long)(8 * NT) << 16 | 8ull << 32;
}
DEVICE void begin_products() {
    __syncwarp();
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
DEVICE void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
DEVICE void await_products() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
DEVICE void wide_multiply(float (&d)[NT][4], u32 a0, u32 a1, u32 a2, u32 a3, unsigned long long x) {
    asm volatile("{.reg .pred p; setp.eq.u32 p, 0, 0;\n"
                 "wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE " {" SUMS "}, {" LEFT "}, " RIGHT ", p, 1, 1, 0;}"
                 : ALL : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(x));
}
DEVICE void settle(unsigned long long &v) { asm volatile("" : "+l"(v)::"memory"); }
DEVICE void settle(u32 (&a)[4]) { asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])::"memory"); }
DEVICE void settle(float (&d)[NT][4]) {  // nothing moves across that reads or makes these
#pragma unroll
    for (int n = 0; n < NT; n++) asm volatile("" : D1(n)::"memory");
}

// One thread asks for a copy; whoever needs it waits for its barrier's phase.
DEVICE void make_barrier(u64 *barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
DEVICE void arrive(u64 *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
DEVICE void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void copy_bulk(void *to, const void *from, u32 bytes, u64 *barrier) {
    u32 at = shared_address(barrier);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(at) : "memory");
}
DEVICE void await(u64 *barrier, u32 phase) {
    asm volatile("{.reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra done; bra again; done:}"
                 ::"r"(shared_address(barrier)), "r"(phase) : "memory");
}
