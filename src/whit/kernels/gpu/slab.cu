// y (rows, outs) = x (rows, columns) W (outs, columns)^T + bias for up to 16 rows, codes of 2, 3, 4 and 8 bits, on Hopper.
//
// Built at run time, one kernel per format and cut, after common.cuh. The host (slab.py) also defines
//   CHUNK              columns of a group that a thread holds, as codes.cuh says
//   STEPS_PER_GROUP    1; 0: all columns of an out share its scale, which its sums are multiplied by at their end
//   ROWS               8 or 16: rows rounded up
//   OUTS               outs of a block's tile, at most 256
//   ACROSS, ALONG      its warps: so many have columns of their own, and of each so many outs of their own
//   STAGES             boxes of W, of 256 columns and all outs, that lie in shared memory for each ACROSS
//   SPLITS             blocks of a cluster that share the columns of one tile
//   MIXED              1: blocks of a cluster take turns along the columns; 0: each has columns in one piece
//   LATE               1: the next product's blocks come when all codes of this one have been asked for; 0: at once
//   DEEP               1: sums of four sixteens of outs take turns, two steps at a time; 0: of two, and of integers one step
//   WEIGHTS            that x is multiplied with, tiles of one behind those of another
//   BLOCKS             per multiprocessor to leave registers for
//
// A block asks for its codes when it begins, as many as there is room for, and two or more blocks fit beside each other,
// of one kernel or of two: while one waits for x or adds up its sums, codes for the other are on their way. A warp reads
// x of a step's columns once, in the order of its operands, and keeps it for all its outs; sums stay in registers until
// all columns are done. They are added over the block's warps and the cluster's blocks always in the same order.
#include "codes.cuh"
#ifndef EMULATED
#include "tiles.cuh"
// Sixteen bytes to the same place in a block of the cluster, whose barrier at that place counts them.
DEVICE void send(float *to, const float4 &v, u64 *barrier, u32 rank) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1,%2,%3,%4}, [%5];"
                 ::"r"(shared_address(to, rank)), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(shared_address(barrier, rank)) : "memory");
}
DEVICE void await_cluster(u64 *barrier, u32 phase) {
    asm volatile("{.reg .pred p;\nagain: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n"
                 "@p bra done;\nbra again;\ndone:}" ::"r"(shared_address(barrier)), "r"(phase) : "memory");
}
// All threads of the cluster say that they began, and know it of the others later.
DEVICE int begin_cluster() {
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
    return 0;
}
DEVICE void cluster_began(int) { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
#endif

DEVICE constexpr int min_of(int a, int b) { return a < b ? a : b; }
constexpr int THREADS = 32 * ACROSS * ALONG, SPAN = 256, HEIGHT = OUTS / ALONG, MT = HEIGHT / 16, RT = ROWS / 8;
constexpr int PAIR = DEEP ? 4 : 2;  // sixteens of outs whose products take turns, since each waits for its last
constexpr int STEPS = SPAN / STEP, X = ROWS * SPAN * 2, X_BOX = ROWS * 128, SLOTS = ACROSS * STAGES;
constexpr int ROW_BYTES = SPAN * BITS / 8, WIDTH = min_of(ROW_BYTES, 128), TILES = ROW_BYTES / WIDTH;  // W's rows in tiles
constexpr int TILE = OUTS * WIDTH, CODES = TILES * TILE;
constexpr bool BY_ROW = STEPS_PER_GROUP == 0;
constexpr int SCALE_BYTES = BY_ROW ? 0 : SCALE == 3 ? 1 : SCALE == 2 ? 4 : 2, SCALE_ROW = STEPS * SCALE_BYTES;
constexpr int ABSMAX = SCALE == 3 ? 4 : 0, ZEROS = ZERO ? 4 : 0, SCALE_BOX = OUTS * (SCALE_ROW + ABSMAX + ZEROS);
constexpr int LEVELS = SCALE == 3 ? 256 : BY_ROW ? OUTS : 0;  // floats: of scales, or the scales themselves

// Integers are operands as they lie: as the bits of a bfloat16 all that is below 256 is so many times its smallest number,
// of a float16 all that is below 2,048. So nothing is put under an exponent, and in bfloat16 a code may stay where it is in
// its byte: x opposite is divided by as much, and all of x 2^64 times as large, so that no product is too small (from 2^63
// on it becomes infinite).
constexpr bool INTEGERS = !CODEBOOK;
constexpr float WHOLE = CODEBOOK ? 1.0f : HALF ? 16777216.0f : 590295810358705651712.0f;  // 2^24, 2^69: what undoes it
constexpr bool HALVES = CODEBOOK && SCALE == 1;  // absmax in 16 bits, times one power of two (halves.py)
constexpr int PITCH = OUTS + 4, PLACE = ROWS * PITCH;  // floats of a warp's column of sums
constexpr int INBOX = SPLITS > 1 ? 1 : 0, STRIDE = MIXED ? ACROSS * SPLITS : ACROSS;  // boxes from one of a warp to its next
constexpr int SHARE = (OUTS / 4 + SPLITS - 1) / SPLITS * 4;  // outs that a block of a cluster finishes
static_assert(ACROSS * PLACE * 4 <= SLOTS * (CODES + X), "the sums take the place of the stages");

struct Weight {
    Map codes;            // as (bytes, outs)
    Scales scales;
    const u16 *bias;
    u16 *y;
    int outs;
};
struct Params {
    Map x;                // as (columns, rows)
    Weight weights[WEIGHTS];
    const u16 *table;
    int columns, rows;
};

// What a warp shares with those of its columns.
struct Ring {
    const Weight *weight;
    u8 *codes, *x, *scales;  // of the first stage; the next one is ACROSS further
    u64 *full, *empty;
    int out, column, count;  // of the first box
    int rank;                // in the cluster
};

DEVICE void ask_codes(const Ring &r, int box) {
    int slot = box % STAGES * ACROSS;
    expect(r.full + slot, CODES + X);
#pragma unroll
    for (int i = 0; i < TILES; i++)
        copy_tile(r.codes + slot * CODES + i * TILE, r.weight->codes, (r.column + box * STRIDE * SPAN) / 8 * BITS + i * WIDTH, r.out, r.full + slot);
}
DEVICE void ask_x(const Params &p, const Ring &r, int box) {
    int slot = box % STAGES * ACROSS;
#pragma unroll
    for (int i = 0; i < SPAN / 64; i++)
        copy_tile(r.x + slot * X + i * X_BOX, p.x, r.column + box * STRIDE * SPAN + 64 * i, 0, r.full + slot);
}
// Where the word begins that the zero points of a box's groups are in.
DEVICE long long zero_word(const Weight &w, int out, int group) { return (long long)out * w.scales.zero_bytes + (group * BITS / 32) * 4; }
// A warp asks for the scales of its own outs, and for their zero points.
DEVICE void ask_scales(const Ring &r, int box, int first, int lane) {
    const Weight &w = *r.weight;
#if STEPS_PER_GROUP
    constexpr int BYTES = min_of(SCALE_ROW, 16), PARTS = SCALE_ROW / BYTES;
    if (box < r.count) {
        u8 *to = r.scales + box % STAGES * ACROSS * SCALE_BOX;
        int group = (r.column + box * STRIDE * SPAN) / STEP;
#pragma unroll
        for (int i = lane; i < HEIGHT * PARTS; i += 32) {
            int row = first + i / PARTS;
            long long index = (long long)min(r.out + row, w.outs - 1) * w.scales.groups + group;
            const u8 *from = (SCALE == 3 ? w.scales.codes : (const u8 *)w.scales.scale) + index * SCALE_BYTES;
            copy_small<BYTES>(to + row * SCALE_ROW + i % PARTS * BYTES, from + i % PARTS * BYTES);
            if (ZEROS) copy_small<4>(to + OUTS * SCALE_ROW + row * 4, (const u8 *)w.scales.zero + zero_word(w, min(r.out + row, w.outs - 1), group));
            if (ABSMAX) copy_small<4>(to + OUTS * SCALE_ROW + row * 4, (const float *)w.scales.scale + (index >> 8));
        }
    }
    end_copies();
#endif
}
// The scales of whole rows: asked for with the codes, laid down when x has been asked for.
constexpr int EACH = (OUTS + THREADS - 1) / THREADS;
DEVICE void load_scales(float (&scales)[EACH], const Weight &w, int out, int tid) {
#pragma unroll
    for (int i = 0; i < EACH; i++) scales[i] = load_scale(w.scales, min(out + tid + i * THREADS, w.outs - 1), 0);
}
DEVICE void lay_scales(float *to, const float (&scales)[EACH], int tid) {
#pragma unroll
    for (int i = 0; i < EACH; i++)
        if (tid + i * THREADS < OUTS) to[tid + i * THREADS] = scales[i];
}

#include "slab_box.cuh"
#include "slab_finish.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) slab(KERNEL_ARGUMENT Params p) {
    extern __shared__ uint4 shared[];  // table, up to 1,024 bytes, codes, x, levels, scales, inbox, barriers
    int tid = threadIdx.x, lane = tid & 31, across = (tid >> 5) % ACROSS, along = (tid >> 5) / ACROSS, first = along * HEIGHT;
    u8 *codes = (u8 *)(shared + TABLE) + (-shared_address(shared) & 1023), *x = codes + SLOTS * CODES;
    float *levels = (float *)(x + SLOTS * X);
    u8 *scales = (u8 *)(levels + LEVELS);
    float *sent = (float *)(scales + SLOTS * SCALE_BOX);
    Inbox inbox = {sent, (u64 *)(sent + INBOX * SPLITS * ROWS * SHARE)};
    u64 *full = inbox.full + 2 * INBOX, *empty = full + SLOTS;
    int rank = SPLITS > 1 ? (int)cluster_rank() : 0, boxes = p.columns / SPAN, share = (boxes + SPLITS - 1) / SPLITS;
    int begin = MIXED ? rank * ACROSS : rank * share, mine = MIXED ? boxes - begin : max(min(share, boxes - begin), 0);
    int tile = (int)blockIdx.x / SPLITS, which = 0;
#pragma unroll
    for (int i = 0; i + 1 < WEIGHTS; i++) {
        int tiles = (p.weights[i].outs + OUTS - 1) / OUTS;
        if (which == i && tile >= tiles) tile -= tiles, which++;
    }
    const Weight &w = p.weights[which];
    Ring r = {&w, codes + across * CODES, x + across * X, scales + across * SCALE_BOX, full + across, empty + across,
              tile * OUTS, (begin + across) * SPAN, max(mine - across + STRIDE - 1, 0) / STRIDE, rank};
    int own = max(min(OUTS - rank * SHARE, SHARE), 0), began = 0;
    float of_rows[EACH];
    bool asks = lane == 0 && along == 0;
    int ahead = min(r.count, STAGES);
    if (!LATE) next_may_begin();
    if (asks) {
#pragma unroll
        for (int i = 0; i < STAGES; i++) make_barrier(r.full + i * ACROSS, 1), make_barrier(r.empty + i * ACROSS, ALONG);
        if (INBOX && across == 0) make_barrier(inbox.full, 1);
        publish_barriers();
        if (INBOX && across == 0) expect(inbox.full, SPLITS * ROWS * own * 4);
#pragma unroll 1
        for (int i = 0; i < ahead; i++) ask_codes(r, i);
    }
    __syncwarp();
    if (INBOX) began = begin_cluster();
#pragma unroll
    for (int i = 0; i < STAGES; i++) ask_scales(r, i, first, lane);
    if (BY_ROW) load_scales(of_rows, w, r.out, tid);
    if (CODEBOOK) lay_table(shared, p.table, THREADS);
    if (SCALE == 3)
        for (int i = tid; i < 256; i += THREADS) levels[i] = w.scales.levels[i];
    Levels of_scales = {levels, SCALE == 3 ? *w.scales.offset : 0.0f};
    Table table = {(const u8 *)shared, (u32)lane * 4};
    if (asks) {
        previous_done();
#pragma unroll 1
        for (int i = 0; i < ahead; i++) ask_x(p, r, i);
    }
    if (BY_ROW) lay_scales(levels, of_rows, tid);
    __syncthreads();
    table.lane = kept(table.lane + shared_place(shared) - BEGINS);  // a block of a cluster has addresses of its own

    float sums[MT][RT][4] = {};
#pragma unroll 1
    for (int box = 0; box < r.count; box++) {
        int slot = box % STAGES * ACROSS, phase = box / STAGES & 1;
        if (LATE && box + STAGES >= r.count) next_may_begin();
        if (!BY_ROW) copies_left<STAGES - 1>();
        await(r.full + slot, phase);
        __syncwarp();
        Turn turn = {r.codes + slot * CODES, r.x + slot * X, r.scales + slot * SCALE_BOX, (r.column + box * STRIDE * SPAN) / STEP * BITS};
        add_box(sums, turn, of_scales, table, first, lane);
        __syncwarp();
        if (box + STAGES < r.count) {
            if (lane == 0) arrive(r.empty + slot);
            if (asks) {
                await(r.empty + slot, phase);
                ask_codes(r, box + STAGES), ask_x(p, r, box + STAGES);
            }
            __syncwarp();
        }
        ask_scales(r, box + STAGES, first, lane);
    }
    __syncthreads();  // nobody reads the stages any more
    float *places = (float *)codes, *place = places + across * PLACE, whole = HALVES ? *w.scales.offset : WHOLE;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int row = first + 16 * m + out_of(lane) + 8 * (e >> 1);
            float scale = BY_ROW ? whole * levels[row] : whole;
#pragma unroll
            for (int n = 0; n < RT; n++) place[(8 * n + 2 * (lane & 3) + (e & 1)) * PITCH + row] = scale * sums[m][n][e];
        }
    __syncthreads();
    if (INBOX) cluster_began(began);
    finish(p, places, inbox, r, tid);
}
