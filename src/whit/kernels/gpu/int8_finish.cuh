// What follows the exact sums of a tile of int8_product.cu: scales, outlier columns, the bias, and rounding.

// An exact sum as a float, but for the outliers and the bias.
DEVICE float scaled(const Aside &a, int sum, int m, int n) {
    sum -= a.offset[m];
#if SHIFTED
    sum -= a.zero[m] * a.sums[n];
#endif
    return multiplied(multiplied((float)sum, a.scale[m]), a.row_scale[n]);
}

// The next outlier columns, where there are more than lie here; all consumers come here.
DEVICE bool more_outliers(const Params &p, Aside &a, const Tile &tile, int &from, int tid) {
#if OUTLIERS
    from += OUTLIERS_AT_ONCE;
    if (from >= a.count) return false;
    meet<AMONG, CONSUMERS>();
    fetch_outliers<BM + BN>(p, a, tile, a.count, from, tid, CONSUMERS);
    meet<AMONG, CONSUMERS>();
    return true;
#else
    return false;
#endif
}

#if SPLITS == 1
DEVICE u32 pair_of(const Aside &a, const float (&y)[4], int half, int n) {
    return round_pair(y[2 * half] + a.bias[n], y[2 * half + 1] + a.bias[n + 1]);
}

// Four lanes hold two outs each of four neighbouring eights; afterwards each holds a whole eight.
DEVICE void gather_eights(u32 (&v)[4], int lane) {
    bool odd = lane & 1, high = lane & 2;
    u32 a = exchange(odd ? v[0] : v[1], 1), b = exchange(odd ? v[2] : v[3], 1);
    (odd ? v[0] : v[1]) = a, (odd ? v[2] : v[3]) = b;
    u32 c = exchange(high ? v[0] : v[2], 2), d = exchange(high ? v[1] : v[3], 2);
    (high ? v[0] : v[2]) = c, (high ? v[1] : v[3]) = d;
}

// Directly to memory, a whole eight of a row at a time.
DEVICE void store_outs(const Params &p, const Aside &a, const Tile &tile, const float (&y)[BN / 8][4], int m, int lane) {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int j = 0; j < BN / 8; j += 4) {
            u32 pairs[4];
#pragma unroll
            for (int i = 0; i < 4; i++) pairs[i] = pair_of(a, y[j + i], h, (j + i) * 8 + 2 * (lane & 3));
            gather_eights(pairs, lane);
            int row = tile.row + m + h * 8;
            if (row < p.rows) store8(p.y + (long long)row * p.outs, tile.out + (j + (lane & 3)) * 8, p.outs, pairs);
        }
}

DEVICE void meet_group(int group) { group ? meet<SECOND, 128>() : meet<FIRST, 128>(); }

// By way of shared memory: all blocks end their tiles at the same time, and their outs at once would wait for memory.
DEVICE void send_outs(const Params &p, const Block &b, const Tile &tile, const float (&y)[BN / 8][4], int tid) {
    constexpr int UNITS = ACROSS / 8, TURN = UNITS * AT_ONCE;  // eights of a box, and of those that are laid down at a time
    int lane = tid & 31, group = tid >> 7, row = (tid >> 5 & 3) * 16 + (lane >> 3 & 1) * 8 + (lane & 7), first = tile.row + group * 64;
    u8 *own = b.y + group * (BOXES * BOX);
#pragma unroll
    for (int from = 0; from < BN / 8; from += TURN) {
        if (tid % 128 == 0) await_boxes<BOXES / AT_ONCE - 1>();
        meet_group(group);
#pragma unroll
        for (int j = from; j < from + TURN; j += 2) {
            u32 pairs[4];
#pragma unroll
            for (int i = 0; i < 4; i++) pairs[i] = pair_of(*b.aside, y[j + i / 2], i % 2, (j + i / 2) * 8 + 2 * (lane & 3));
            int unit = j + (lane >> 4), within = unit % UNITS ^ (ACROSS == 64 ? row & 7 : row >> 1 & 3);  // the copies' swizzle
            lay_matrices(own + unit / UNITS % BOXES * BOX + row * (ACROSS * 2) + within * 16, pairs);
        }
        publish_tiles();
        meet_group(group);
        if (tid % 128) continue;
        for (int j = from; j < from + TURN; j += UNITS)
            if (tile.out + j * 8 < p.outs && first < p.rows) send_box(p.boxes, tile.out + j * 8, first, own + j / UNITS % BOXES * BOX);
        end_boxes();
    }
}

DEVICE void finish(const Params &p, const Block &b, const Tile &tile, const int (&sums)[BN / 8][4], int tid) {
    Aside &a = *b.aside;
    int lane = tid & 31, m = (tid >> 5) * 16 + (lane >> 2), n = 2 * (lane & 3);
    meet<READY, CONSUMERS + HELPERS>();
    float y[BN / 8][4];
#pragma unroll
    for (int j = 0; j < BN / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) y[j][e] = scaled(a, sums[j][e], m + (e >> 1) * 8, j * 8 + n + (e & 1));
#if OUTLIERS
    int from = 0;
    do {
        if (!a.here) break;
        uint2 top = load_four(a.x, m, lane), bottom = load_four(a.x, m + 8, lane);
#pragma unroll
        for (int j = 0; j < BN / 8; j++) {
            uint2 right = load_four(a.weight, j * 8 + (lane >> 2), lane);
            multiply(y[j], top.x, bottom.x, top.y, bottom.y, right.x, right.y);
        }
    } while (more_outliers(p, a, tile, from, tid));
#endif
    if constexpr (THROUGH) send_outs(p, b, tile, y, tid);
    else store_outs(p, a, tile, y, m, lane);
    announce<FREE, CONSUMERS + HELPERS>();
}
#else
// The blocks of a cluster lay down their sums, and each finishes a part of the tile: eight outs per thread and turn.
DEVICE void lay_down(const Block &b, const int (&sums)[BN / 8][4], int tid) {
    int *block = (int *)b.stages, lane = tid & 31, m = (tid >> 5) * 16 + (lane >> 2), n = 2 * (lane & 3);
    meet<AMONG, CONSUMERS>();  // nobody reads the stages any more
#pragma unroll
    for (int j = 0; j < BN / 8; j++) {
        *(int2 *)(block + m * PITCH + j * 8 + n) = make_int2(sums[j][0], sums[j][1]);
        *(int2 *)(block + (m + 8) * PITCH + j * 8 + n) = make_int2(sums[j][2], sums[j][3]);
    }
}

DEVICE void finish_share(const Params &p, const Block &b, const Tile &tile, int tid) {
    Aside &a = *b.aside;
    const int *block = (const int *)b.stages;
    int eights = min(p.rows - tile.row, BM) * (BN / 8), from = 0;
    constexpr int TURNS = BM * BN / 8 / (CONSUMERS * SPLITS);  // at most
    static_assert(TURNS * CONSUMERS * SPLITS == BM * BN / 8, "a tile is shared out evenly");
    float y[TURNS][8];
    meet<READY, CONSUMERS + HELPERS>();
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        int i = (turn * SPLITS + b.rank) * CONSUMERS + tid, m = i / (BN / 8), n = i % (BN / 8) * 8;
        if (i >= eights) continue;
        int total[8] = {};
#pragma unroll
        for (int r = 0; r < SPLITS; r++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int4 v = load_from(block + m * PITCH + n + 4 * h, r);
                total[4 * h] += v.x, total[4 * h + 1] += v.y, total[4 * h + 2] += v.z, total[4 * h + 3] += v.w;
            }
#pragma unroll
        for (int e = 0; e < 8; e++) y[turn][e] = scaled(a, total[e], m, n + e);
    }
#if OUTLIERS
    do {
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            int i = (turn * SPLITS + b.rank) * CONSUMERS + tid, m = i / (BN / 8), n = i % (BN / 8) * 8;
            if (i >= eights) continue;
            for (int k = 0; k < a.here; k++)
#pragma unroll
                for (int e = 0; e < 8; e++) y[turn][e] += a.x[k * BM + m] * a.weight[k * BN + n + e];
        }
    } while (more_outliers(p, a, tile, from, tid));
#endif
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        int i = (turn * SPLITS + b.rank) * CONSUMERS + tid, m = i / (BN / 8), n = i % (BN / 8) * 8;
        if (i >= eights) continue;
        u32 pairs[4];
#pragma unroll
        for (int e = 0; e < 4; e++)
            pairs[e] = round_pair(y[turn][2 * e] + a.bias[n + 2 * e], y[turn][2 * e + 1] + a.bias[n + 2 * e + 1]);
        store8(p.y + (long long)(tile.row + m) * p.outs, tile.out + n, p.outs, pairs);
    }
}
#endif
