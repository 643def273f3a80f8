// How many.cu writes its sums: added up over the blocks that share the columns, turned, rounded, and stored.

// Sixteen bytes of y, or as much as there is.
DEVICE void store8(const Weight &p, int row, int out, const u32 (&pairs)[4]) {
    u16 *to = p.y + (long long)row * p.outs + out;
    if (p.outs % 8 == 0 && out < p.outs) {
        *(uint4 *)to = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (out + i < p.outs) to[i] = (u16)(pairs[i >> 1] >> 16 * (i & 1));
}

// Four lanes hold two outs each of four eights; afterwards each holds a whole eight.
DEVICE void gather_eights(u32 (&v)[4], int lane) {
    bool odd = lane & 1, high = lane & 2;
    u32 a = exchange(odd ? v[0] : v[1], 1), b = exchange(odd ? v[2] : v[3], 1);
    (odd ? v[0] : v[1]) = a, (odd ? v[2] : v[3]) = b;
    u32 c = exchange(high ? v[0] : v[2], 2), d = exchange(high ? v[1] : v[3], 2);
    (high ? v[0] : v[2]) = c, (high ? v[1] : v[3]) = d;
}

DEVICE constexpr int owner(int pair) { return pair * SPLITS / PAIRS; }  // of the blocks that share the columns
DEVICE constexpr int first_of(int share) { return (share * PAIRS + SPLITS - 1) / SPLITS; }

// What makes outs of a lane's sums, which are outs g and g + 8 of rows 2 t and 2 t + 1.
struct Last {
    float bias[2], up[2];
};
DEVICE Last last_of(const Weight &p, const Lane &w) {
    Last l;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        l.bias[h] = p.bias ? widen(p.bias[w.out[h]]) : 0.0f;
        l.up[h] = DIRECT ? 0x1p20f : AFTER ? w.after[h] * RAISED : 1.0f;
    }
    return l;
}
DEVICE u32 rounded(const Last &l, const float (&d)[4], int h) { return round_pair(d[2 * h] * l.up[h] + l.bias[h], d[2 * h + 1] * l.up[h] + l.bias[h]); }

#if OUT_BOXES
constexpr int BOX = 64 * 128, OUT_ROOM = WG * OUT_BOXES * BOX;  // 64 rows of the outs of four warps
static_assert(NT % 8 == 0 && SPLITS == 1 && WG <= 2, "tiles of whole boxes, which one block adds up");
DEVICE void meet_four(int four) { four ? meet<AMONG + 2, 128>() : meet<AMONG + 1, 128>(); }

// By way of shared memory, from where they are copied beside the next tile's products: written by threads, the outs of
// all blocks, which end their tiles at the same time, would wait for memory.
DEVICE void send_outs(const Params &p, const Block &b, const Tile &tile, const Sums &sums, const Lane &w, int tid) {
    int four = uniform(tid >> 7), within = w.lane & 7, unit = (tid >> 5 & 3) * 2 + (w.lane >> 3 & 1);  // of a row: eight outs
    u8 *own = b.outs + four * (OUT_BOXES * BOX), *at = own + (w.lane >> 4) * 1024 + within * 128 + (unit ^ within) * 16;
    const Weight &part = p.part[tile.part];
    Last last = last_of(part, w);
#pragma unroll
    for (int box = 0; box < NT / 8; box++) {
        if (MIXED && box >= NT / 16 && tile.low) continue;
        if (tid % 128 == 0) await_boxes<OUT_BOXES - 1>();
        meet_four(four);
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
            u32 pairs[4];
#pragma unroll
            for (int i = 0; i < 4; i++) pairs[i] = rounded(last, sums.all[box * 8 + n + i / 2], i % 2);
            lay_turned(at + box % OUT_BOXES * BOX + n * 1024, pairs);
        }
        publish_tiles();
        meet_four(four);
        if (tid % 128) continue;
        int row = tile.row + box * 64, out = tile.out + four * 64;
        if (row < p.rows && out < part.outs) send_box(p.boxes[tile.part], out, row, own + box % OUT_BOXES * BOX);
        end_boxes();
    }
}
#endif

// A lane's sums turned: outs 2 t and 2 t + 1 of row g.
DEVICE void finish(const Weight &p, const Tile &tile, int rows, const Sums &sums, const Lane &w, int warp_out, int share) {
    Last last = last_of(p, w);
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
        if (SPLITS > 1 && APART != 1 && owner(n / 2) != share || MIXED && n >= NT / 2 && tile.low) continue;
        u32 eights[4];
#pragma unroll
        for (int i = 0; i < 4; i++) eights[i] = transpose(rounded(last, sums.all[n + i / 2], i % 2));
        gather_eights(eights, w.lane);
        int row = tile.row + (n + (w.lane >> 1 & 1)) * 8 + (w.lane >> 2);
        if (row < rows) store8(p, row, warp_out + (w.lane & 1) * 8, eights);
    }
}

#if APART == 2
// Each block lays down what the others finish, waits for theirs, and adds up what it finishes itself. A warp's sums meet
// only the same warp's of other blocks, so warps wait for nothing else. All of the blocks run at a time, or are begun in order.
DEVICE void share_sums(const Params &p, const Block &b, Sums &sums, int tile, int tid) {
    float4 *first = p.partial + (long long)tile * SPLITS * NT * CONSUMERS + tid;
    u32 *arrived = p.arrived + tile * (CONSUMERS / 32) + tid / 32;
    int share = b.share, begin = first_of(share);
#pragma unroll
    for (int n = 0; n < NT; n++) {
        if (owner(n / 2) == share) continue;
        const float *d = sums.all[n];
        first[(share * NT + n) * CONSUMERS] = make_float4(d[0], d[1], d[2], d[3]);
    }
    __syncwarp();
    if (tid % 32 == 0) count_round(arrived, 2 * SPLITS), await_count(arrived, SPLITS);
    __syncwarp();
    float4 v[2 * OWN][SPLITS];
#pragma unroll
    for (int i = 0; i < 2 * OWN; i++)
#pragma unroll
        for (int r = 0; r < SPLITS; r++)
            if (r != share && 2 * begin + i < NT) v[i][r] = load_sums(first + (r * NT + 2 * begin + i) * CONSUMERS);
#pragma unroll
    for (int n = 0; n < NT; n++) {
        if (owner(n / 2) != share) continue;
        float *d = sums.all[n];
        float4 own = {d[0], d[1], d[2], d[3]}, all = {};
#pragma unroll
        for (int r = 0; r < SPLITS; r++) {
            float4 one = r == share ? own : v[n - 2 * first_of(owner(n / 2))][r];
            all.x += one.x, all.y += one.y, all.z += one.z, all.w += one.w;
        }
        d[0] = all.x, d[1] = all.y, d[2] = all.z, d[3] = all.w;
    }
    __syncwarp();
    if (tid % 32 == 0) count_round(arrived, 2 * SPLITS);  // the last leaves zero
}
#elif APART
// Lays a block's sums where the others find them; true for the last block of a tile, which then has those of all.
DEVICE bool last_to_come(const Params &p, const Block &b, Sums &sums, int tile, int tid) {
    float4 *first = p.partial + (long long)tile * SPLITS * NT * CONSUMERS + tid;
#pragma unroll
    for (int n = 0; n < NT; n++) {
        const float *d = sums.all[n];
        first[(b.share * NT + n) * CONSUMERS] = make_float4(d[0], d[1], d[2], d[3]);
    }
    u32 *before = (u32 *)b.sums;
    __threadfence();
    meet<AMONG, CONSUMERS>();
    if (tid == 0) *before = atomicAdd(p.arrived + tile, 1u);
    meet<AMONG, CONSUMERS>();
    if (*before != SPLITS - 1) return false;
    __threadfence();
    constexpr int AT_ONCE = NT * SPLITS <= 32 ? NT : 32 / SPLITS;  // tiles of rows whose sums are on their way together
#pragma unroll
    for (int begin = 0; begin < NT; begin += AT_ONCE) {
        float4 v[AT_ONCE][SPLITS];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
            for (int r = 0; r < SPLITS; r++)
                if (begin + i < NT) v[i][r] = load_sums(first + (r * NT + begin + i) * CONSUMERS);
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            if (begin + i >= NT) continue;
            float *d = sums.all[begin + i];
            d[0] = d[1] = d[2] = d[3] = 0;
#pragma unroll
            for (int r = 0; r < SPLITS; r++) d[0] += v[i][r].x, d[1] += v[i][r].y, d[2] += v[i][r].z, d[3] += v[i][r].w;
        }
    }
    if (tid == 0) p.arrived[tile] = 0;
    return true;
}
#elif SPLITS > 1
// Where a block finds what `from` has handed to `to`, a thread's sums of two tiles of rows beside another's.
DEVICE float4 *handed(const Block &b, int from, int to, int pair, int tid) {
    return (float4 *)(b.sums + (from - (from > to)) * HANDED) + (pair - first_of(to)) * 2 * CONSUMERS + tid;
}
DEVICE void hand_over(const Block &b, const Sums &sums, int tid) {
#pragma unroll
    for (int pair = 0; pair < PAIRS; pair++) {
        int to = owner(pair);
        if (to == (int)b.share) continue;
        float4 *at = handed(b, b.share, to, pair, tid);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float *d = sums.all[2 * pair + i];
            store_to(at + i * CONSUMERS, {d[0], d[1], d[2], d[3]}, to * PAIR + b.side);
        }
    }
}
DEVICE void add_handed(const Block &b, Sums &sums, int tid) {
#pragma unroll
    for (int pair = 0; pair < PAIRS; pair++) {
        if (owner(pair) != (int)b.share) continue;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float *d = sums.all[2 * pair + i];
            float4 own = {d[0], d[1], d[2], d[3]}, all = {};
#pragma unroll
            for (int r = 0; r < SPLITS; r++) {
                float4 v = r == (int)b.share ? own : handed(b, r, b.share, pair, tid)[i * CONSUMERS];
                all.x += v.x, all.y += v.y, all.z += v.z, all.w += v.w;
            }
            d[0] = all.x, d[1] = all.y, d[2] = all.z, d[3] = all.w;
        }
    }
}
#endif
