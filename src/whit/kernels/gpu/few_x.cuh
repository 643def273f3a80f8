// x of few.cu: laid into shared memory once, in the order of the operands, and its sums.

// x in the order of the operands, [step][unit][row][lane & 3]. A quarter of a warp writes 128 neighbouring bytes, rows
// side by side, and reads what neighbouring columns are left; BATCH rows are on the way before the first is written.
constexpr int ROW_LANES = ROWS > 1 ? 2 : 1, UNIT_LANES = 8 / ROW_LANES, TURNS = ROWS / ROW_LANES;
constexpr int BATCH = 4, SIDE = TURNS < BATCH ? BATCH / TURNS : 1, DEEP = TURNS < BATCH ? TURNS : BATCH;
DEVICE void stage(uint4 *xs, const Params &p, int first_step, int steps, int tid) {
    int t = tid & 3, side_row = tid >> 2 & (ROW_LANES - 1), units = steps * UNITS, apart = THREADS / 32 * UNIT_LANES;
    int place = PAIRED ? (t & 1) * 2 + t / 2 : t;
    const u16 *from = p.x + first_step * STEP + place * CHUNK;
#pragma unroll 1
    for (int at = tid / (4 * ROW_LANES); at < units; at += SIDE * apart) {
#pragma unroll 1
        for (int turn = 0; turn < TURNS; turn += DEEP) {
            uint4 held[SIDE][DEEP];
#pragma unroll
            for (int i = 0; i < SIDE; i++)
#pragma unroll
                for (int k = 0; k < DEEP; k++) {
                    int u = min(at + i * apart, units - 1), row = min((turn + k) * ROW_LANES + side_row, p.rows - 1);
                    held[i][k] = load_opposite(from + (long long)row * p.columns + u / UNITS * STEP, u % UNITS);
                }
#pragma unroll
            for (int i = 0; i < SIDE; i++)
#pragma unroll
                for (int k = 0; k < DEEP; k++) {
                    int u = at + i * apart, row = (turn + k) * ROW_LANES + side_row;
                    if (u < units) xs[(u * ROWS + row) * 4 + t] = held[i][k];
                }
        }
    }
}

// One row whose operands are eight neighbouring columns each is laid down and summed in one pass.
constexpr bool STRAIGHT = ROWS == 1 && !PLACED && (NATURAL || PERIOD == 8);
constexpr int SHARERS = 4 * UNITS, PER_SUM = SHARERS / SPREAD;  // operands of a row and step, of one group
DEVICE void lay(uint4 *xs, float *sums, const uint4 &v, int unit, int units) {
    int in = unit % SHARERS, chunk = in / UNITS, t = PAIRED ? (chunk & 1) * 2 + chunk / 2 : chunk;
    uint4 turned = {permute(v.x, v.z, 0x5410), permute(v.x, v.z, 0x7632), permute(v.y, v.w, 0x5410), permute(v.y, v.w, 0x7632)};
    if (unit < units) xs[(unit / SHARERS * UNITS + in % UNITS) * 4 + t] = NATURAL ? v : turned;
    if (!SUMMED) return;
    u32 pairs[4] = {v.x, v.y, v.z, v.w};
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) sum += widen(pairs[i] & 0xFFFF) + widen(pairs[i] >> 16);
#pragma unroll
    for (int flip = PER_SUM / 2; flip; flip /= 2) sum += from_lane(sum, flip);
    if (unit < units && unit % PER_SUM == 0) sums[unit / PER_SUM] = sum;
}
DEVICE void stage_row(uint4 *xs, float *sums, const Params &p, int first_step, int steps, int tid) {
    const uint4 *from = (const uint4 *)p.x + first_step * SHARERS;
    int units = steps * SHARERS;
#pragma unroll 1
    for (int first = tid; first - tid < units; first += BATCH * THREADS) {
        uint4 held[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) held[i] = from[min(first + i * THREADS, units - 1)];
#pragma unroll
        for (int i = 0; i < BATCH; i++)
            if (first - tid + i * THREADS < units) lay(xs, sums, held[i], first + i * THREADS, units);
    }
}
#if NORMED
static_assert(STRAIGHT, "an operand is of eight neighbouring columns");
DEVICE void stage_norm(uint4 *xs, float *sums, const Several &p, const uint4 (&weights)[ROW_HELD], float *room, int tid) {
    uint4 held[ROW_HELD];
    norm_row(held, (uint4 *)p.part[0].x, nullptr, weights, p.epsilon, room);
#pragma unroll
    for (int h = 0; h < ROW_HELD; h++) lay(xs, sums, held[h], h * THREADS + tid, ROW_UNITS);
}
#endif

struct Shared {
    u32 x;               // where the lane's row and columns of the warp's first step lie
    const float *sums;   // of x, from the warp's first step on
    const float *levels;
    Table table;
    bool has_x;          // its column of the product has x where its columns of W are
};

// What the operands' exponents add to a product with x, [step][row][group]: its product with a row in which every level
// is 0. Zero points need the sum of x alone. One or two rows are too few for the tensor cores to be the faster way.
#if ROWS > 2
DEVICE void sum_steps(float *sums, const Shared &s, const uint4 *, int steps, int tid) {
    int lane = tid & 31;
#pragma unroll 1
    for (int step = tid >> 5; step < steps; step += WARPS) {
        float part[NT][4] = {};
#pragma unroll
        for (int unit = 0; unit < UNITS; unit++) {
            u32 a[4];
#pragma unroll
            for (int i = 0; i < 4; i++) a[i] = PLACED ? MAGIC + both(OFFSET << place_at(unit, i)) : ONES;
#pragma unroll
            for (int n = 0; n < NT; n++) {
                uint4 b = shared_if(s.has_x, s.x + step * (16 * PER_STEP) + (unit * ROWS + 8 * n) * 64);
                multiply(part[n], a[0], a[0], a[1], a[1], b.x, b.y);
                multiply(part[n], a[2], a[2], a[3], a[3], b.z, b.w);
            }
        }
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                if (lane < 4 && 8 * n + 2 * lane + e < V) sums[step * V + 8 * n + 2 * lane + e] = part[n][e];
    }
}
#else
DEVICE void sum_steps(float *sums, const Shared &, const uint4 *xs, int steps, int tid) {
    u32 count = steps * SHARERS * ROWS;
    for (u32 first = tid / 32 * 32; first < count; first += THREADS) {
        u32 i = first + tid % 32, at = i / SHARERS, step = at / ROWS, row = at % ROWS, in = i % SHARERS;
        float sum = 0;
        if (i < count) {
            uint4 v = xs[((step * UNITS + in % UNITS) * ROWS + row) * 4 + in / UNITS];
            u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int k = 0; k < 4; k++) {
                float factor = PLACED ? 128.0f + OFFSET * (float)(1 << place_at(in % UNITS, k)) : 1.0f;
                sum += (widen(pairs[k] & 0xFFFF) + widen(pairs[k] >> 16)) * factor;
            }
        }
#pragma unroll
        for (int flip = PER_SUM / 2; flip; flip /= 2) sum += from_lane(sum, flip);
        if (i < count && in % PER_SUM == 0) sums[i / PER_SUM] = sum;
    }
}
#endif
