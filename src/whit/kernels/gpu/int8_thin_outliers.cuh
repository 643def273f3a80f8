// What int8_thin.cu needs of outlier columns: of W taken out of the steps as they pass, of x fetched one by one.

DEVICE float weight_of(u32 code, float scale) {  // rounded as if it had been dequantized
    float w = multiplied((float)code - 128, scale);
    return widen(round_pair(w, w) & 0xFFFF);
}

// What the first outlier columns need of W, which a warp takes out of each step and lays where it will be used.
DEVICE void take_outliers(const Params &p, const Block &b, int lane) {
    float scale[OUTS / 32];
#pragma unroll
    for (int q = 0; q < OUTS / 32; q++) scale[q] = p.row_scale[min(b.out + q * 32 + lane, p.outs - 1)];
    await_earlier();
    int count = fresh(p.listed), column = fresh(p.listed + 1 + lane % OUTLIERS_AT_ONCE);
    if (lane >= min(count, OUTLIERS_AT_ONCE)) column = -1;
    if (lane == 0) b.aside->count = count;
    if (lane == 0 && SPLITS > 1) expect(b.sent, LAID + min(count, OUTLIERS_AT_ONCE) * SHARE * 4);
#pragma unroll 1
    for (int step = 0; step < b.steps; step++) {
        int slot = step % STAGES;
        await(b.full + slot, step / STAGES & 1);
        const u8 *stage = b.stages + slot * W_BYTES;
        for (u32 left = lanes_with(column >= 0 && column / BK == b.begin + step); left; left &= left - 1) {
            int i = count_bits((left & (0 - left)) - 1), at = from_lane_number(column, i) % BK;
#pragma unroll
            for (int q = 0; q < OUTS / 32; q++) {
                int n = q * 32 + lane;
                float w = weight_of(stage[n * BK + (((at >> 4) ^ (n & 7)) << 4 | (at & 15))], scale[q]);
                u32 *to = (u32 *)&b.aside->weight[i][n % SHARE];
                if (SPLITS > 1) send(to, float_bits(w), n / SHARE, b.sent);
                else *to = float_bits(w);
            }
        }
        __syncwarp();
        if (lane == 0) arrive(b.empty + slot);
    }
    if (SPLITS == 1) announce<AMONG, READERS>();
}

// What they need of x, several numbers of a thread under way at a time.
DEVICE void fetch_rows(const Params &p, const Block &b, int tid, int threads) {
    constexpr int AT_A_TIME = 8;
    int lane = tid & 31, count = fresh(p.listed), mine = fresh(p.listed + 1 + lane % OUTLIERS_AT_ONCE);
    int all = min(count, OUTLIERS_AT_ONCE) * BN;
    for (int first = 0; first < all; first += AT_A_TIME * threads) {
        u32 found[AT_A_TIME];
#pragma unroll
        for (int k = 0; k < AT_A_TIME; k++) {
            int j = first + k * threads + tid, m = j % BN, column = from_lane_number(mine, j / BN % OUTLIERS_AT_ONCE);
            found[k] = j < all && m < p.rows ? fresh(p.floats + (long long)m * p.columns + column) : 0;
        }
#pragma unroll
        for (int k = 0; k < AT_A_TIME; k++) {
            int j = first + k * threads + tid;
            if (j < all) b.aside->x[j / BN][j % BN] = widen(found[k]);
        }
    }
}

// Further outlier columns [from, from + OUTLIERS_AT_ONCE), of which there are `here`.
DEVICE void fetch_more(const Params &p, const Block &b, int from, int here, int tid) {
    for (int i = tid; i < here * (BN + SHARE); i += THREADS) {
        int m = i % (BN + SHARE), k = i / (BN + SHARE), out = b.own + m - BN, column = fresh(p.listed + 1 + from + k);
        if (m >= BN) b.aside->weight[k][m - BN] = out < p.outs ? weight_of(p.codes[(long long)out * p.columns + column], p.row_scale[out]) : 0;
        else if (m < p.rows) b.aside->x[k][m] = widen(fresh(p.floats + (long long)m * p.columns + column));
    }
}
