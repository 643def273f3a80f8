// y (rows, outs) = x (rows, columns) W (outs, columns)^T + bias for up to 16 rows, codes of 4 bits, on Hopper.
//
// Built at run time, one kernel per format and cut, after common.cuh. The host (near.py) also defines
//   CHUNK              columns of a group that a thread holds, as codes.cuh says
//   ROWS               1, 2, 4, 8 or 16: rows rounded up
//   WARPS              of a block; each has SPAN columns of the block's, always the same ones
//   STAGES             tiles of W that a warp has under way
//   MIN_BLOCKS         blocks per multiprocessor to leave registers for
//
// x stays in registers: a warp meets its own columns of every tile of 16 outs, so nothing but codes and scales moves
// through shared memory. Each warp asks for its own tiles, many ahead and without a pause, and waits for nobody to get
// them. The warps' sums of a tile are added when the next one is done and all have long come, always in the same order.
#include "codes.cuh"
#ifndef EMULATED
#include "tiles.cuh"
#endif

constexpr int THREADS = 32 * WARPS, SPAN = 256, TILE = 16, BOX = 1024, STAGE = 2 * BOX;  // a box: 16 outs, 64 bytes of each
constexpr int STEPS = SPAN / STEP, PER_BOX = 128 / STEP, RT = ROWS > 8 ? ROWS / 8 : 1;
constexpr int SCALE_BYTES = SCALE == 3 ? 1 : SCALE == 2 ? 4 : 2;
constexpr int SCALE_ROW = STEPS * SCALE_BYTES, ABSMAX = SCALE == 3 ? 64 : 0, SCALE_STAGE = TILE * SCALE_ROW + ABSMAX;
constexpr bool SUMMED = HAS_RAW;
constexpr float BIAS = HAS_RAW ? (HALF ? 1024.0f : 128.0f) + OFFSET : 0.0f;
constexpr int PITCH = TILE + 4, PLACE = WARPS * ROWS * PITCH;  // floats
constexpr int TABLE_AT = 2 * PLACE * 4, LEVELS_AT = TABLE_AT + TABLE * 16;  // bytes, after the stages

struct Params {
    Map codes;            // as (bytes, outs)
    Scales scales;
    const u16 *table, *x, *bias;
    u16 *y;
    int outs, columns, rows;
};

struct Ring {
    u8 *stages;           // of this warp
    u8 *scales;
    u64 *full;
    int column, tiles, stride;
};

DEVICE void ask(const Params &p, const Ring &r, int tile, int slot, int lane) {
    if (lane == 0 && tile < r.tiles) {
        expect(r.full + slot, STAGE);
        copy_tile(r.stages + slot * STAGE, p.codes, r.column / 2, tile * TILE, r.full + slot);
        copy_tile(r.stages + slot * STAGE + BOX, p.codes, r.column / 2 + 64, tile * TILE, r.full + slot);
    }
    constexpr int BYTES = SCALE_ROW > 16 ? 16 : SCALE_ROW, LANES = SCALE_ROW / BYTES;
    if (tile < r.tiles && r.column < p.columns) {
        int row = lane / LANES, out = min(tile * TILE + row % TILE, p.outs - 1);
        long long index = (long long)out * p.scales.groups + r.column / STEP;
        const u8 *from = (SCALE == 3 ? p.scales.codes : (const u8 *)p.scales.scale) + index * SCALE_BYTES;
        u8 *to = r.scales + slot * SCALE_STAGE;
        if (row < TILE) copy_small<BYTES>(to + lane * BYTES, from + lane % LANES * BYTES);
        else if (ABSMAX) copy_small<4>(to + TILE * SCALE_ROW + 4 * (row - TILE), (const float *)p.scales.scale + (index >> 8));
    }
    end_copies();
}

DEVICE float scale_at(const u8 *row, int step, const float *levels, float absmax, float offset) {
    if constexpr (SCALE == 3) return levels[row[step]] * absmax + offset;
    else if constexpr (SCALE == 2) return ((const float *)row)[step];
    else if constexpr (SCALE == 1) return widen_f16(((const u16 *)row)[step]);
    else return bits_float((u32)((const u16 *)row)[step] << 16);
}

// x of a lane's columns for its row of each eight, in the order of the operands; and minus BIAS times the sums of x.
struct Operand {
    uint4 x[STEPS][UNITS][RT];
    float minus[SUMMED ? STEPS : 1][RT][2];
};
DEVICE void load_x(Operand &o, const Params &p, int column, int lane) {
#pragma unroll
    for (int n = 0; n < RT; n++) {
        int row = 8 * n + (lane >> 2);
        bool there = row < p.rows && column < p.columns;
        const u16 *x = p.x + (long long)min(row, p.rows - 1) * p.columns + (there ? column : 0) + (lane & 3) * CHUNK;
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            float sum = 0;
#pragma unroll
            for (int u = 0; u < UNITS; u++) {
                uint4 w = *(const uint4 *)(x + s * STEP + 8 * u), v = w;
                if (!NATURAL) v = make_uint4(permute(w.x, w.z, 0x5410), permute(w.x, w.z, 0x7632), permute(w.y, w.w, 0x5410), permute(w.y, w.w, 0x7632));
                if (!there) v = make_uint4(0, 0, 0, 0);
                o.x[s][u][n] = v;
                u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int k = 0; k < 4; k++) sum += widen(pairs[k] & 0xFFFF) + widen(pairs[k] >> 16);
            }
            if (!SUMMED) continue;
            sum += from_lane(sum, 1), sum += from_lane(sum, 2);
#pragma unroll
            for (int e = 0; e < 2; e++) o.minus[s][n][e] = -BIAS * of_lane(sum, 4 * (2 * (lane & 3) + e));
        }
    }
}

// The sums of one tile: rows 2 t and 2 t + 1 of each eight with outs of place g and g + 8.
DEVICE void add_tile(float (&sums)[RT][4], const Operand &o, const u8 *stage, const u8 *scales, const Table &table, const float *levels, float offset, int out, int lane) {
    const float *absmax = (const float *)(scales + TILE * SCALE_ROW);
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        float part[RT][4];
        int at = s % PER_BOX * STEP / 2 + (lane & 3) * WORDS * 4;  // of a row's 64 bytes
        const u8 *from = stage + s / PER_BOX * BOX + out * 64 + ((at >> 4 ^ (out >> 1 & 3)) << 4 | at & 15);
        u32 words[2][WORDS];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            if constexpr (WORDS == 4) {
                uint4 v = *(const uint4 *)(from + h * 512);
                words[h][0] = v.x, words[h][1] = v.y, words[h][WORDS - 2] = v.z, words[h][WORDS - 1] = v.w;
            } else if constexpr (WORDS == 2) {
                uint2 v = *(const uint2 *)(from + h * 512);
                words[h][0] = v.x, words[h][WORDS - 1] = v.y;
            } else {
                words[h][0] = *(const u32 *)(from + h * 512);
            }
        }
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
            u32 top[4], bottom[4];
            decode<HAS_RAW>(top, words[0], u, table);
            decode<HAS_RAW>(bottom, words[1], u, table);
#pragma unroll
            for (int n = 0; n < RT; n++) {
                uint4 b = o.x[s][u][n];
                float first = SUMMED ? o.minus[SUMMED ? s : 0][n][0] : 0.0f, second = SUMMED ? o.minus[SUMMED ? s : 0][n][1] : 0.0f;
                if (u == 0) multiply_from(part[n], first, second, top[0], bottom[0], top[1], bottom[1], b.x, b.y);
                else multiply(part[n], top[0], bottom[0], top[1], bottom[1], b.x, b.y);
                multiply(part[n], top[2], bottom[2], top[3], bottom[3], b.z, b.w);
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float scale = scale_at(scales + (out + 8 * h) * SCALE_ROW, s, levels, SCALE == 3 ? absmax[out + 8 * h] : 0.0f, offset);
#pragma unroll
            for (int n = 0; n < RT; n++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    sums[n][2 * h + e] = s ? sums[n][2 * h + e] + scale * part[n][2 * h + e] : scale * part[n][2 * h + e];
        }
    }
}

DEVICE void lay_down(float *place, const float (&sums)[RT][4], int out, int lane) {
#pragma unroll
    for (int n = 0; n < RT; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int row = 8 * n + 2 * (lane & 3) + (e & 1);
            if (row < ROWS) place[row * PITCH + out + 8 * (e >> 1)] = sums[n][e];
        }
}
DEVICE void store(const Params &p, int row, int out, float value) {
    if (row >= p.rows || out >= p.outs) return;
    if (p.bias) value += widen(p.bias[out]);
    p.y[(long long)row * p.outs + out] = (u16)round_pair(value, value);
}

// The block's sum for place i of a tile, [row][out].
DEVICE float add_warps(const float *place, int i) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += place[(w * ROWS + i / TILE) * PITCH + i % TILE];
    return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) near(KERNEL_ARGUMENT Params p) {
    extern __shared__ uint4 shared[];  // up to 1,024 bytes, the warps' stages, sums of two tiles, table, levels, scales, barriers
    int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    u8 *stages = (u8 *)shared + (-shared_address(shared) & 1023), *after = stages + WARPS * STAGES * STAGE;
    float *places = (float *)after, *levels = (float *)(after + LEVELS_AT);
    u8 *scales = (u8 *)(levels + (SCALE == 3 ? 256 : 0));
    u64 *barriers = (u64 *)(scales + WARPS * STAGES * SCALE_STAGE), *came = barriers + WARPS * STAGES;
    Ring r = {stages + warp * STAGES * STAGE, scales + warp * STAGES * SCALE_STAGE, barriers + warp * STAGES,
              warp * SPAN, (p.outs + TILE - 1) / TILE, (int)gridDim.x};
    next_may_begin();
    if (lane == 0) {
        for (int i = 0; i < STAGES; i++) make_barrier(r.full + i, 1);
        publish_barriers();
    }
    __syncwarp();
    int first = blockIdx.x;
#pragma unroll 1
    for (int i = 0; i < STAGES; i++) ask(p, r, first + i * r.stride, i, lane);
    if (tid == 0) {
        for (int i = 0; i < 2; i++) make_barrier(came + i, WARPS);
        publish_barriers();
    }
    if (CODEBOOK) fill_table((uint4 *)(after + TABLE_AT), p.table, THREADS);
    if (SCALE == 3)
        for (int i = tid; i < 256; i += THREADS) levels[i] = p.scales.levels[i];
    float offset = SCALE == 3 ? *p.scales.offset : 0.0f;
    Table table = {after + TABLE_AT, (u32)lane * 4};
    previous_done();
    Operand o;
    load_x(o, p, r.column, lane);
    __syncthreads();

    int out = (lane >> 2 & 1) | (lane >> 2 & 2) << 1 | (lane >> 2 & 4) >> 1;  // so that eights of a half warp lie in all banks
    int slot = 0, phase = 0, count = 0;
    // Tile `done` of this block, which has become a sum per warp.
    auto join = [&](int done) {
        int tile = first + done * r.stride;
        await(came + (done & 1), done >> 1 & 1);
        const float *place = places + (done & 1) * PLACE;
#pragma unroll
        for (int i = tid; i < TILE * ROWS; i += THREADS) {
            store(p, i / TILE, tile * TILE + i % TILE, add_warps(place, i));
        }
    };
#pragma unroll 1
    for (int tile = first; tile < r.tiles; tile += r.stride, count++) {
        copies_left<STAGES - 1>();
        await(r.full + slot, phase);
        __syncwarp();
        float sums[RT][4] = {};
        if (r.column < p.columns) add_tile(sums, o, r.stages + slot * STAGE, r.scales + slot * SCALE_STAGE, table, levels, offset, out, lane);
        __syncwarp();
        ask(p, r, tile + STAGES * r.stride, slot, lane);
        if (++slot == STAGES) slot = 0, phase ^= 1;
        if (count) join(count - 1);
        lay_down(places + (count & 1) * PLACE + warp * ROWS * PITCH, sums, out, lane);
        __syncwarp();
        if (lane == 0) arrive(came + (count & 1));
    }
    if (count) {
        join(count - 1);
    }
}
