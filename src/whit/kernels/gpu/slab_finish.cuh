// From the warps' sums to y, as slab.cu takes it: added over the block, then over the cluster, in one order.

DEVICE void store4(const Weight &w, int rows, int row, int out, const float4 &v) {
    if (row >= rows || out >= w.outs) return;
    float y[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (w.bias) y[i] += widen(w.bias[min(out + i, w.outs - 1)]);
    u16 *to = w.y + (long long)row * w.outs + out;
    if (w.outs % 4 == 0) {
        *(uint2 *)to = make_uint2(round_pair(y[0], y[1]), round_pair(y[2], y[3]));
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (out + i < w.outs) to[i] = (u16)round_pair(y[i], y[i]);
}
struct Inbox {
    float *sums;
    u64 *full;
};
DEVICE void add(float4 &sum, const float4 &v) { sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w; }

// The warps' sums, [across][row][out], become the block's, of which each block of the cluster gets a share from all, in its
// inbox: [rank][row][share].
DEVICE void finish(const Params &p, const float *places, const Inbox &inbox, const Ring &r, int tid) {
    int rank = r.rank;
#pragma unroll 1
    for (int i = tid; i < ROWS * OUTS / 4; i += THREADS) {
        int row = i / (OUTS / 4), out = i % (OUTS / 4) * 4;
        float4 sum = *(const float4 *)(places + row * PITCH + out);
#pragma unroll
        for (int w = 1; w < ACROSS; w++) add(sum, *(const float4 *)(places + w * PLACE + row * PITCH + out));
        if (SPLITS == 1) store4(*r.weight, p.rows, row, r.out + out, sum);
        else send(inbox.sums + (rank * ROWS + row) * SHARE + out % SHARE, sum, inbox.full, out / SHARE);
    }
#if SPLITS > 1
    if (rank * SHARE >= OUTS) return;
    await_cluster(inbox.full, 0);
#pragma unroll 1
    for (int i = tid; i < ROWS * SHARE / 4; i += THREADS) {
        int row = i / (SHARE / 4), out = i % (SHARE / 4) * 4;
        if (row >= p.rows || rank * SHARE + out >= OUTS) continue;
        float4 sum = *(const float4 *)(inbox.sums + row * SHARE + out);
#pragma unroll
        for (int k = 1; k < SPLITS; k++) add(sum, *(const float4 *)(inbox.sums + (k * ROWS + row) * SHARE + out));
        store4(*r.weight, p.rows, row, r.out + rank * SHARE + out, sum);
    }
#endif
}
