// What int8_product.cu needs of outlier columns: numbers of x fetched one by one, those of W too where blocks share a tile,
// else taken out of the steps as they pass.

DEVICE u32 weight_of(u32 code, float scale) {  // rounded as if it had been dequantized
    float w = multiplied((float)code - 128, scale);
    return round_pair(w, w) & 0xFFFF;
}
#if SPLITS == 1
// As mma's lanes want them: numbers 2 q, 2 q + 1 and those plus 8 beside each other.
DEVICE int place_of(int i, int row) { return row * OUTLIERS_AT_ONCE + (i % 8 / 2) * 4 + i / 8 * 2 + i % 2; }
DEVICE void lay_row(Aside &a, int i, int m, u32 x) { a.x[place_of(i, m)] = x; }
DEVICE void lay_out(Aside &a, int i, int n, u32 weight) { a.weight[place_of(i, n)] = weight; }
DEVICE uint2 load_four(const u16 *from, int row, int lane) { return *(const uint2 *)(from + row * OUTLIERS_AT_ONCE + (lane & 3) * 4); }
#else
DEVICE void lay_row(Aside &a, int i, int m, u32 x) { a.x[i * BM + m] = widen(x); }
DEVICE void lay_out(Aside &a, int i, int n, u32 weight) { a.weight[i * BN + n] = widen(weight); }
#endif

// Outlier columns [from, from + OUTLIERS_AT_ONCE) of the tile's rows, and of its outs where WIDTH is that of both. Where
// there are less, zeros.
template <int WIDTH> DEVICE void fetch_outliers(const Params &p, Aside &a, const Tile &tile, int count, int from, int tid, int threads) {
    int here = min(max(count - from, 0), OUTLIERS_AT_ONCE), lane = tid & 31, all = (here ? OUTLIERS_AT_ONCE : 0) * WIDTH;
    int mine = lane < here ? fresh(p.listed + 1 + from + lane) : 0;
    for (int first = tid; first < all; first += AT_A_TIME * threads) {
        u32 found[AT_A_TIME];
#pragma unroll
        for (int k = 0; k < AT_A_TIME; k++) {
            int j = first + k * threads, i = j / WIDTH, m = j % WIDTH, out = tile.out + m - BM;
            found[k] = 0;
            if (j >= all) break;  // as do all of a warp
            int column = from_lane_number(mine, i);
            if (i >= here) continue;
            if (m < BM && tile.row + m < p.rows) found[k] = fresh(p.floats + (long long)(tile.row + m) * p.columns + column);
            if (m >= BM && out < p.outs) found[k] = weight_of(p.codes[(long long)out * p.columns + column], p.row_scale[out]);
        }
#pragma unroll
        for (int k = 0; k < AT_A_TIME; k++) {
            int j = first + k * threads, i = j / WIDTH, m = j % WIDTH;
            if (j >= all) break;
            if (m < BM) lay_row(a, i, m, found[k]);
            else lay_out(a, i, m - BM, found[k]);
        }
    }
    if (tid == 0) a.count = count, a.here = here;
}

// What the first of them need of W, taken out of a tile's steps by a warp; `taken` counts steps.
DEVICE void take_outliers(const Params &p, const Block &b, const Tile &tile, int &taken, int column, int lane) {
    float scale[BN / 32];
#pragma unroll
    for (int q = 0; q < BN / 32; q++) scale[q] = p.row_scale[min(tile.out + q * 32 + lane, p.outs - 1)];
#pragma unroll 1
    for (int step = 0; step < b.steps; step++, taken++) {
        int slot = taken % STAGES;
        await(b.full + slot, taken / STAGES & 1);
        const u8 *stage = b.stages + slot * STAGE + X_BYTES;
        for (u32 left = lanes_with(column >= 0 && column / BK == step); left; left &= left - 1) {
            int i = count_bits((left & (0 - left)) - 1), at = from_lane_number(column, i) % BK;
#pragma unroll
            for (int q = 0; q < BN / 32; q++) {
                int n = q * 32 + lane;
                lay_out(*b.aside, i, n, weight_of(stage[n * BK + (((at >> 4) ^ (n & 7)) << 4 | (at & 15))], scale[q]));
            }
        }
        __syncwarp();
        release(b, slot, lane);
    }
}
