// What near.cu needs beyond emulate_cluster.h and emulate_many.h.
static void block_barrier() {
    Meeting &m = meetings[own()][0];
    int turn = m.turn;
    if (++m.count == threads) m.count = 0, m.turn++;
    while (m.turn == turn) yield();
    threadIdx.x = current % threads;
}
#define __syncthreads block_barrier
static float lane_flipped(float v, int flip) { return of_lane(v, current % 32 ^ flip); }
#define from_lane lane_flipped
template <int BYTES> static void copy_small(void *to, const void *from) {
    if ((uintptr_t)from % BYTES || ((u8 *)to - (u8 *)shared) % BYTES) __builtin_trap();
    memcpy(to, from, BYTES);
}
static void multiply_from(float (&d)[4], float first, float second, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    d[0] = d[2] = first, d[1] = d[3] = second;
    multiply(d, a0, a1, a2, a3, b0, b1);
}
