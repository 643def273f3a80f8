// x (rows, columns) in the order in which tiled.cu multiplies it: per tile of ROWS rows and unit of 32 columns four
// matrices of (ROWS, 8), each the columns that lie opposite one pair of codes in every thread. Missing rows are zeros.
#include "codes.cuh"

struct Params {
    const u16 *x;
    uint4 *to;
    int rows, columns;
};

constexpr int THREADS = 128;
constexpr int ROWS = 8 * NT;

extern "C" __global__ void __launch_bounds__(THREADS) arrange(const Params p) {
    u32 index = blockIdx.x * THREADS + threadIdx.x, units = p.columns / 32;
    u32 in_tile = index % ROWS, unit = index / ROWS;
    int row = blockIdx.z * ROWS + in_tile;
    if (unit >= units) return;
    uint4 held[4];
    next_may_begin(), previous_done();
    const u16 *from = p.x + (long long)row * p.columns + unit / UNITS * STEP;
#pragma unroll
    for (int t = 0; t < 4; t++)
        held[t] = row < p.rows ? load_opposite(from + t * CHUNK, unit % UNITS) : make_uint4(0, 0, 0, 0);
    uint4 *to = p.to + ((long long)blockIdx.z * units + unit) * 4 * ROWS + in_tile;
    to[0] = make_uint4(held[0].x, held[1].x, held[2].x, held[3].x);
    to[ROWS] = make_uint4(held[0].y, held[1].y, held[2].y, held[3].y);
    to[2 * ROWS] = make_uint4(held[0].z, held[1].z, held[2].z, held[3].z);
    to[3 * ROWS] = make_uint4(held[0].w, held[1].w, held[2].w, held[3].w);
}
