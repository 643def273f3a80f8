// What slab.cu needs beyond emulate_near.h: sums that are sent to another block of the cluster.
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
