// y (rows, outs) = x (rows, columns) W (outs, columns)^T + bias for more rows than stream.cu is for.
//
// Built at run time, one kernel per format and configuration, after common.cuh. The host (tiled.py) also defines
//   CHUNK, STEPS_PER_GROUP, SPREAD    as codes.cuh says
//   MT, WG             tiles of 64 outs per four warps, and how many four warps
//   NT                 tiles of 8 rows in a block
//   AHEAD, STAGES      steps of W that a thread holds; steps of x in shared memory
//   MIN_BLOCKS         blocks per multiprocessor to leave registers for
//   WGMMA              1: Hopper's instructions (hopper.cuh), 0: those of compute capability 8.0
//
// Four warps multiply 64 outs, whose weights they decode in their registers (codes.cuh), with all rows of the block,
// which arrange.cu has laid out for them: on Hopper one instruction for 16 columns, running while other warps
// decode. Weights are scaled before they are multiplied and rounded once, as the dequantizing kernel does, except that
// levels of a codebook are rounded before the scale too. Splits of the columns are added in a fixed order.
#define BARE (STEPS_PER_GROUP && !HALF && !CODEBOOK && BITS < 8 && ZERO % 3 == 0 && SCALE == 0)
#include "codes.cuh"
#include "sums.cuh"

typedef unsigned long long u64;
constexpr int THREADS = 128 * WG;
constexpr int OUTS = 64 * MT * WG;   // of a block
constexpr int ROWS = 8 * NT;         // of a block
constexpr int STAGE = STEP / 8 * ROWS;  // of uint4: a step of x
constexpr int STRIDE = OUTS + 4;     // of a row of sums
constexpr int BATCH = UNITS < 4 / MT ? UNITS : 4 / MT;  // units that are decoded, then multiplied
#if WGMMA
#include "hopper.cuh"
#endif

struct Held {  // what a thread holds of W for one step: rows 8 apart
    u32 words[MT][2][WORDS];
    float scale[MT][2], zero[MT][2];
};

DEVICE void load_held(Held &held, const Params &p, int step, int first_out, int lane) {
#pragma unroll
    for (int m = 0; m < 2 * MT; m++) {
        int out = min(first_out + (m >> 1) * 64 + (m & 1) * 8 + (lane >> 2), p.outs - 1);
        load_words(held.words[m >> 1][m & 1], p.codes + (long long)out * p.row_words + (step * 4 + (lane & 3)) * WORDS);
#if STEPS_PER_GROUP
        int group = step / STEPS_PER_GROUP * SPREAD + (lane & 3) * SPREAD / 4;
        held.scale[m >> 1][m & 1] = load_scale(p.scales, out, group);
        held.zero[m >> 1][m & 1] = load_zero(p.scales, out, group);
#endif
    }
}

// The operands of a unit of one row, scaled where a group has its own scale.
DEVICE void operands(u32 (&pairs)[4], const Held &held, int m, int h, int unit, const Table &table) {
    decode<BARE>(pairs, held.words[m][h], unit, table);
#if BARE
    scale_bare(pairs, unit, held.scale[m][h]);
#elif STEPS_PER_GROUP
    scale_pairs(pairs, held.scale[m][h], held.zero[m][h]);
#endif
}

// Steps of x pass through a ring of stages in shared memory. On Hopper one thread asks for them, once every warp has
// said that it is done with what was there; two steps early, so that the others may lag behind it by one.
struct Ring {
    uint4 *stages;
    u64 *full, *empty;
    const uint4 *from;  // the block's first step
    int steps;
};
constexpr int EARLY = WGMMA ? STAGES - 2 : STAGES - 1;  // steps that are asked for before they are needed

DEVICE uint4 *stage_of(const Ring &ring, int step) { return ring.stages + step % STAGES * STAGE; }

DEVICE void fetch(const Ring &ring, int step) {
    const uint4 *from = ring.from + (long long)step * STAGE;
#if WGMMA
    if (threadIdx.x || step >= ring.steps) return;
    if (step >= STAGES) await(ring.empty + step % STAGES, (step / STAGES - 1) & 1);
    copy_bulk(stage_of(ring, step), from, STAGE * 16, ring.full + step % STAGES);
#else
    uint4 *to = stage_of(ring, step);
    if (step < ring.steps)
        for (int i = threadIdx.x; i < STAGE; i += THREADS) copy_behind(to + i, from + i);
    end_copies();
#endif
}

DEVICE void wait_for(const Ring &ring, int step) {
#if WGMMA
    fetch(ring, step + EARLY);
    await(ring.full + step % STAGES, step / STAGES & 1);
#else
    copies_left<EARLY - 1>();
    __syncthreads();
    fetch(ring, step + EARLY);
#endif
}

struct Sums {
    float all[MT][NT][4];
};
struct Operands {
    u32 top[BATCH][MT][4], bottom[BATCH][MT][4];
};

// `x`: the stage, from the batch's first unit on.
DEVICE void multiply_batch(Sums &sums, Operands &w, const uint4 *x, int lane) {
#if WGMMA
#pragma unroll
    for (int u = 0; u < BATCH; u++)
#pragma unroll
        for (int m = 0; m < MT; m++) settle(w.top[u][m]), settle(w.bottom[u][m]);
    begin_products();
#pragma unroll
    for (int u = 0; u < BATCH; u++)
#pragma unroll
        for (int m = 0; m < MT; m++) {
            u32(&a)[4] = w.top[u][m], (&b)[4] = w.bottom[u][m];
            wide_multiply(sums.all[m], a[0], b[0], a[1], b[1], describe(x + u * 4 * ROWS));
            wide_multiply(sums.all[m], a[2], b[2], a[3], b[3], describe(x + (u * 4 + 2) * ROWS));
        }
    end_products();
    await_products();
#else
    const u32 *pairs = (const u32 *)x + lane;
#pragma unroll
    for (int u = 0; u < BATCH; u++)
#pragma unroll
        for (int n = 0; n < NT; n++) {
            u32 x[4];
#pragma unroll
            for (int i = 0; i < 4; i++) x[i] = pairs[((u * 4 + i) * ROWS + n * 8) * 4];
#pragma unroll
            for (int m = 0; m < MT; m++) {
                u32(&a)[4] = w.top[u][m], (&b)[4] = w.bottom[u][m];
                multiply(sums.all[m][n], a[0], b[0], a[1], b[1], x[0], x[1]);
                multiply(sums.all[m][n], a[2], b[2], a[3], b[3], x[2], x[3]);
            }
        }
#endif
}

DEVICE void multiply_step(Sums &sums, const Held &held, const Ring &ring, const Table &table, int step, int lane) {
    wait_for(ring, step);
#pragma unroll
    for (int unit = 0; unit < UNITS; unit += BATCH) {
        Operands w;
#pragma unroll
        for (int u = 0; u < BATCH; u++)
#pragma unroll
            for (int m = 0; m < MT; m++) {
                operands(w.top[u][m], held, m, 0, unit + u, table);
                operands(w.bottom[u][m], held, m, 1, unit + u, table);
            }
        multiply_batch(sums, w, stage_of(ring, step) + unit * 4 * ROWS, lane);
    }
#if WGMMA
    if (lane == 0) arrive(ring.empty + step % STAGES);
#endif
}

DEVICE void write_sums(const Sums &sums, float *block, const Params &p, int first_out, int warp_out, int lane) {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int out = m * 64 + (e >> 1) * 8 + (lane >> 2);
#if STEPS_PER_GROUP
            float scale = BARE ? 0x1p20f : 1.0f;
#else
            float scale = load_scale(p.scales, min(first_out + out, p.outs - 1), 0);
#endif
#pragma unroll
            for (int n = 0; n < NT; n++) {
                int row = n * 8 + (lane & 3) * 2 + (e & 1);
                block[row * STRIDE + warp_out + out] = scale * sums.all[m][n][e];
            }
        }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) tiled(const Params p) {
    extern __shared__ uint4 shared[];  // 8 uint4 of barriers, the table, the stages
    int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    int warp_out = (warp >> 2) * 64 * MT + (warp & 3) * 16, first_out = blockIdx.x * OUTS + warp_out;
    int first_row = blockIdx.z * ROWS, all_steps = p.columns / STEP;
    int begin = blockIdx.y * p.split_steps, steps = min(p.split_steps, all_steps - begin);
    const uint4 *x = (const uint4 *)p.x + ((long long)blockIdx.z * all_steps + begin) * STAGE;
    Ring ring = {shared + 8 + TABLE, (u64 *)shared, (u64 *)shared + STAGES, x, steps};
    Table table = {(const u8 *)(shared + 8), (u32)lane * 4};

    Held held[AHEAD];
#pragma unroll
    for (int j = 0; j < AHEAD; j++)
        if (j < steps) load_held(held[j], p, begin + j, first_out, lane);
#if WGMMA
    if (tid < STAGES) make_barrier(ring.full + tid, 1), make_barrier(ring.empty + tid, THREADS / 32);
    publish_barriers();
#endif
    if (CODEBOOK) fill_table(shared + 8, p.table, THREADS);
    next_may_begin(), previous_done();
    __syncthreads();
#pragma unroll 1
    for (int step = 0; step < EARLY; step++) fetch(ring, step);

    Sums sums = {};
#pragma unroll 1
    for (int first = 0; first < steps; first += AHEAD)
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            if (first + j >= steps) break;
            multiply_step(sums, held[j], ring, table, first + j, lane);
            if (first + j + AHEAD < steps) load_held(held[j], p, begin + first + j + AHEAD, first_out, lane);
        }
#if WGMMA
#pragma unroll
    for (int m = 0; m < MT; m++) settle(sums.all[m]);
#endif
    __syncthreads();
    float *block = (float *)(shared + 8);  // behind the barriers: their memory must not be written before they are done
    write_sums(sums, block, p, first_out, warp_out, lane);
    __syncthreads();
    finish(p, block, STRIDE, OUTS, first_row, min(p.rows - first_row, ROWS), THREADS);
}
