// What slab.cu needs beyond emulate_cluster.h and emulate_many.h.
static float lane_flipped(float v, int flip) { return of_lane(v, current % 32 ^ flip); }
#define from_lane lane_flipped
template <int BYTES> static void copy_small(void *to, const void *from) {
    if ((uintptr_t)from % BYTES || ((u8 *)to - (u8 *)shared) % BYTES) __builtin_trap();
    memcpy(to, from, BYTES);
}
static void multiply_from(float (&d)[4], const float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    for (int i = 0; i < 4; i++) d[i] = c[i];
    multiply(d, a0, a1, a2, a3, b0, b1);
}
// Sums that are sent to another block of the cluster.
static void send(float *to, const float4 &v, u64 *barrier, u32 rank) {
    memcpy(place(to, rank), &v, 16);
    Barrier *b = (Barrier *)place(barrier, rank);
    b->bytes -= 16, settled(b);
}
static void await_cluster(u64 *barrier, u32 phase) { await(barrier, phase); }
static int begin_cluster() {
    int turn = cluster_turn;
    if (++at_cluster == threads * cluster) at_cluster = 0, cluster_turn++;
    return turn;
}
static void cluster_began(int turn) {
    while (cluster_turn == turn) yield();
    threadIdx.x = current % threads;
}
