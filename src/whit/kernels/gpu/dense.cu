// y (outs) = x (COLUMNS) W (outs, COLUMNS)^T for one row, W in x's own type: a model's head, as fast as W can be read.
// Built after common.cuh. Macros:
//   COLUMNS   a multiple of 256
//   THREADS   of a block
//
// A warp takes ROWS rows of W at a time, a lane eight columns of every 256. What it has added up it asks for again, of
// its next columns or rows, so that as much is always under way; the first of it before x is there.
struct Params {
    const u16 *x, *w;
    u16 *y;
    int outs;
};

constexpr int ROWS = 2;
constexpr int UNITS = COLUMNS / 256;  // of eight columns, of a lane
constexpr int HELD = UNITS % 8 == 0 ? 8 : UNITS % 4 == 0 ? 4 : UNITS % 2 == 0 ? 2 : 1;  // under way of each row

struct Rows {  // where a lane's next columns lie
    const uint4 *from[ROWS];
};
DEVICE Rows rows_of(const Params &p, int group, int lane) {
    Rows rows;
#pragma unroll
    for (int r = 0; r < ROWS; r++) rows.from[r] = (const uint4 *)p.w + (long long)min(group * ROWS + r, p.outs - 1) * (COLUMNS / 8) + lane;
    return rows;
}
DEVICE float multiplied_by(const uint4 &w, const uint4 &x, float sum) {
    u32 a[4] = {w.x, w.y, w.z, w.w}, b[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; i++) sum += widen(a[i] & 0xFFFF) * widen(b[i] & 0xFFFF), sum += widen(a[i] >> 16) * widen(b[i] >> 16);
    return sum;
}
DEVICE void store_sums(const Params &p, float (&sums)[ROWS], int group, int lane) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int flip = 16; flip; flip /= 2) sums[r] += from_lane(sums[r], flip);
        int out = group * ROWS + r;
        if (lane == r && out < p.outs) p.y[out] = (u16)round_pair(sums[r], sums[r]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) dense(const Params p) {
    extern __shared__ uint4 shared[];  // x
    int lane = threadIdx.x % 32, warps = gridDim.x * (THREADS / 32), groups = (p.outs + ROWS - 1) / ROWS;
    int group = threadIdx.x / 32 * gridDim.x + blockIdx.x;
    Rows rows = rows_of(p, group, lane);
    uint4 held[ROWS][HELD];
#pragma unroll
    for (int u = 0; u < HELD; u++)
#pragma unroll
        for (int r = 0; r < ROWS; r++) held[r][u] = load16(rows.from[r] + u * 32);
    next_may_begin(), previous_done();
    for (int i = threadIdx.x; i < COLUMNS / 8; i += THREADS) shared[i] = ((const uint4 *)p.x)[i];
    __syncthreads();
#pragma unroll 1
    for (; group < groups; group += warps) {
        float sums[ROWS] = {};
        bool more = group + warps < groups;
        Rows next = more ? rows_of(p, group + warps, lane) : rows;  // at the end what is there already
#pragma unroll
        for (int first = 0; first < UNITS; first += HELD) {
            bool last = first + HELD == UNITS;
#pragma unroll
            for (int u = 0; u < HELD; u++) {
                uint4 x = shared[(first + u) * 32 + lane];
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    sums[r] = multiplied_by(held[r][u], x, sums[r]);
                    const uint4 *from = last ? next.from[r] + u * 32 : rows.from[r] + (first + HELD + u) * 32;
                    if (!last || more) held[r][u] = load16(from);
                }
            }
        }
        store_sums(p, sums, group, lane);
        rows = next;
    }
}
