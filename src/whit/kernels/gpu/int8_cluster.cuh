// Blocks of a cluster, which send to each other, and barriers that count what arrives.
//
// Nothing here waits until what a thread wrote can be seen by other multiprocessors but cluster_barrier, which takes half a
// microsecond for that: `send` brings along the news of its bytes.

#ifndef EMULATED
typedef unsigned long long u64;
DEVICE u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE u32 shared_address(const void *p, u32 rank) {  // the same place in another block of the cluster
    u32 at;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(p)), "r"(rank));
    return at;
}
[[maybe_unused]] DEVICE u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
[[maybe_unused]] DEVICE void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// The same in two parts, for threads that only have to have come so far: what they wrote need not be there yet.
[[maybe_unused]] DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
[[maybe_unused]] DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait;" ::: "memory"); }
[[maybe_unused]] DEVICE int4 load_from(const int *p, u32 rank) {
    int4 v;
    asm volatile("ld.shared::cluster.v4.s32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(shared_address(p, rank)) : "memory");
    return v;
}

// To the same place in a block of the cluster, whose barrier at that place counts the bytes; so nobody waits for memory.
[[maybe_unused]] DEVICE void send(int4 *p, int4 v, u32 rank, u64 *barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.s32 [%0], {%1,%2,%3,%4}, [%5];"
                 ::"r"(shared_address(p, rank)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(shared_address(barrier, rank)) : "memory");
}
[[maybe_unused]] DEVICE void send(u32 *p, u32 v, u32 rank, u64 *barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];"
                 ::"r"(shared_address(p, rank)), "r"(v), "r"(shared_address(barrier, rank)) : "memory");
}// The same, joined with what is there.
[[maybe_unused]] DEVICE void join(u32 *p, u32 v, u32 rank, u64 *barrier) {
    asm volatile("red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.or.b32 [%0], %1, [%2];"
                 ::"r"(shared_address(p, rank)), "r"(v), "r"(shared_address(barrier, rank)) : "memory");
}

// Barriers within a block, of so many threads: some wait, others only say that they were there.
template <int ID, int COUNT> DEVICE void meet() { asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(COUNT) : "memory"); }
template <int ID, int COUNT> DEVICE void announce() { asm volatile("bar.arrive %0, %1;" ::"n"(ID), "n"(COUNT) : "memory"); }

[[maybe_unused]] DEVICE void make_barrier(u64 *barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
[[maybe_unused]] DEVICE void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
[[maybe_unused]] DEVICE void arrive(u64 *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
[[maybe_unused]] DEVICE void arrive(u64 *barrier, u32 rank) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(shared_address(barrier, rank)) : "memory");
}
[[maybe_unused]] DEVICE void expect(u64 *barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
[[maybe_unused]] DEVICE void expect(u64 *barrier, u32 bytes, u32 rank) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cluster.b64 _, [%0], %1;" ::"r"(shared_address(barrier, rank)), "r"(bytes) : "memory");
}
[[maybe_unused]] DEVICE void await(u64 *barrier, u32 phase) {
    asm volatile("{.reg .pred p;\nagain: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@p bra done;\nbra again;\ndone:}" ::"r"(shared_address(barrier)), "r"(phase) : "memory");
}
// The same for what other blocks of the cluster sent.
[[maybe_unused]] DEVICE void await_sent(u64 *barrier, u32 phase) {
    asm volatile("{.reg .pred p;\nagain: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n"
                 "@p bra done;\nbra again;\ndone:}" ::"r"(shared_address(barrier)), "r"(phase) : "memory");
}
#endif
