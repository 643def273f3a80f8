// The end of a tile in few.cu: its warps' sums become outs, while those that are done go on to the next tile.
constexpr int RING = 4;

// The warps' sums of a tile lie in shared memory as [warp][row][group][out], in one of RING places in turn. One warp, in
// turn too, adds them when all have come, and says when the place is free; the others go on to the next tile meanwhile.
struct Turn {
    float *blocks;
    int count;       // tiles that this block has done
    bool used_again; // this place, by a tile to come
};
enum { ALL_CAME = 1, FREE = ALL_CAME + RING };  // barriers, one for each place

DEVICE void lay_down(float *block, const Sums &sums, int warp, int lane) {
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int row = 8 * n + 2 * (lane & 3) + (e & 1), out = (e >> 1) * 8 + (lane >> 2);
            if (row < V) block[(warp * V + row) * 16 + out] = sums.all[n][e];
        }
}

// They become outs of y, or of a slice, which the last block to come to the tile adds: always in the same order.
DEVICE void add_warps(const float *block, const Params &p, int tile, int lane) {
    int slices = gridDim.y, slice = blockIdx.y, out = tile * 16 + lane % 16, half = lane / 16;
#pragma unroll 1
    for (int row = 0; row < p.rows; row++) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < (WARPS * SPREAD + 1) / 2; i++) {
            int at = 2 * i + half, w = at / SPREAD, group = at % SPREAD;
            if (WARPS * SPREAD % 2 == 0 || w < WARPS) sum += block[((w * ROWS + row) * SPREAD + group) * 16 + lane % 16];
        }
        sum += from_lane(sum, 16);
        if (half || out >= p.outs) continue;
        if (slices == 1) store(p, row, out, sum);
        else p.partial[((long long)slice * p.rows + row) * p.outs + out] = sum;
    }
    if (slices == 1) return;
    __threadfence();
    warp_meets();
    float ticket = lane ? 0.0f : (float)atomicAdd(p.arrived + tile, 1u);
#pragma unroll
    for (int flip = 16; flip; flip /= 2) ticket += from_lane(ticket, flip);
    if ((int)ticket != slices - 1) return;
    __threadfence();
#pragma unroll 1
    for (int row = 0; row < p.rows && !half && out < p.outs; row++) {
        float sum = 0;
#pragma unroll 4
        for (int k = 0; k < slices; k++) sum += load_uncached(p.partial + ((long long)k * p.rows + row) * p.outs + out);
        store(p, row, out, sum);
    }
    if (lane == 0) p.arrived[tile] = 0;
}

DEVICE void join(const Turn &turn, const Sums &sums, const Params &p, int tile, int tid) {
    int lane = tid & 31, warp = tid >> 5, place = turn.count % RING, adder = turn.count % WARPS;
    float *block = turn.blocks + place * WARPS * V * 16;
    if (turn.count >= RING && warp != (turn.count - RING) % WARPS) barrier_meet(FREE + place, THREADS);
    lay_down(block, sums, warp, lane);
    if (warp != adder) {
        barrier_arrive(ALL_CAME + place, THREADS);
        return;
    }
    barrier_meet(ALL_CAME + place, THREADS);
    add_warps(block, p, tile, lane);
    warp_meets();
    if (turn.used_again) barrier_arrive(FREE + place, THREADS);
}
