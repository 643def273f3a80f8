// y (rows, outs) = x (rows, columns) W (outs, columns)^T + bias for up to 16 rows, codes of 4 bits, on Hopper.
//
// Built at run time, one kernel per format and cut, after common.cuh. The host (slab.py) also defines
//   CHUNK              columns of a group that a thread holds, as codes.cuh says
//   ROWS               8 or 16: rows rounded up
//   OUTS               outs of a block's tile, at most 256
//   ACROSS, ALONG      its warps: so many have columns of their own, and of each so many outs of their own
//   STAGES             boxes of W, of 256 columns and all outs, that lie in shared memory for each ACROSS
//   SPLITS             blocks of a cluster that share the columns of one tile
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

constexpr int THREADS = 32 * ACROSS * ALONG, SPAN = 256, HEIGHT = OUTS / ALONG, MT = HEIGHT / 16, RT = ROWS / 8;
constexpr int PAIR = 2;  // sixteens of outs whose products take turns, since each waits for its last
constexpr int STEPS = SPAN / STEP, CODES = OUTS * 128, X = ROWS * SPAN * 2, X_BOX = ROWS * 128, SLOTS = ACROSS * STAGES;
constexpr int SCALE_BYTES = SCALE == 3 ? 1 : SCALE == 2 ? 4 : 2, SCALE_ROW = STEPS * SCALE_BYTES;
constexpr int ABSMAX = SCALE == 3 ? 4 : 0, SCALE_BOX = OUTS * (SCALE_ROW + ABSMAX);

// Integers are operands as they lie: as the bits of a bfloat16 all that is below 256 is so many times its smallest number,
// of a float16 all that is below 2,048. So nothing is put under an exponent, and in bfloat16 a code may stay where it is in
// its byte: x of every second pair is a sixteenth, and all of x 2^64 times as large, so that no product is too small
// (from 2^63 on it becomes infinite).
constexpr bool INTEGERS = !CODEBOOK, PLACES_FOUR = INTEGERS && !HALF;
constexpr float WHOLE = CODEBOOK ? 1.0f : HALF ? 16777216.0f : 590295810358705651712.0f;  // 2^24, 2^69: what undoes it
constexpr u32 LARGER = 0x5F805F80u, LESS = 0x5D805D80u;  // 2^64, 2^60 in bfloat16
DEVICE constexpr int lies_at(int pair) { return PLACES_FOUR ? pair % 2 * 4 : 0; }
DEVICE constexpr u32 minus_of(int pair) { return both(0x8000u | OFFSET << lies_at(pair)); }
constexpr int PITCH = OUTS + 4, PLACE = ROWS * PITCH;  // floats of a warp's column of sums
constexpr int INBOX = SPLITS > 1 ? 1 : 0;
constexpr int SHARE = (OUTS / 4 + SPLITS - 1) / SPLITS * 4;  // outs that a block of a cluster finishes
static_assert(ACROSS * PLACE * 4 <= SLOTS * (CODES + X), "the sums take the place of the stages");

struct Params {
    Map codes, x;         // as (bytes, outs) and (columns, rows)
    Scales scales;
    const u16 *table, *bias;
    u16 *y;
    int outs, columns, rows;
};

// What a warp shares with those of its columns.
struct Ring {
    u8 *codes, *x, *scales;  // of the first stage; the next one is ACROSS further
    u64 *full, *empty;
    int out, column, count;  // of the first box
};

DEVICE void ask_codes(const Params &p, const Ring &r, int box) {
    int slot = box % STAGES * ACROSS;
    expect(r.full + slot, CODES + X);
    copy_tile(r.codes + slot * CODES, p.codes, (r.column + box * ACROSS * SPAN) / 2, r.out, r.full + slot);
}
DEVICE void ask_x(const Params &p, const Ring &r, int box) {
    int slot = box % STAGES * ACROSS;
#pragma unroll
    for (int i = 0; i < SPAN / 64; i++)
        copy_tile(r.x + slot * X + i * X_BOX, p.x, r.column + box * ACROSS * SPAN + 64 * i, 0, r.full + slot);
}
// A warp asks for the scales of its own outs.
DEVICE void ask_scales(const Params &p, const Ring &r, int box, int first, int lane) {
    constexpr int BYTES = SCALE_ROW > 16 ? 16 : SCALE_ROW, PARTS = SCALE_ROW / BYTES;
    if (box < r.count) {
        u8 *to = r.scales + box % STAGES * ACROSS * SCALE_BOX;
        int group = (r.column + box * ACROSS * SPAN) / STEP;
#pragma unroll
        for (int i = lane; i < HEIGHT * PARTS; i += 32) {
            int row = first + i / PARTS;
            long long index = (long long)min(r.out + row, p.outs - 1) * p.scales.groups + group;
            const u8 *from = (SCALE == 3 ? p.scales.codes : (const u8 *)p.scales.scale) + index * SCALE_BYTES;
            copy_small<BYTES>(to + row * SCALE_ROW + i % PARTS * BYTES, from + i % PARTS * BYTES);
            if (ABSMAX) copy_small<4>(to + OUTS * SCALE_ROW + row * 4, (const float *)p.scales.scale + (index >> 8));
        }
    }
    end_copies();
}

struct Levels {  // of scales
    const float *values;
    float offset;
};
DEVICE float scale_at(const u8 *box, int row, int step, const Levels &levels) {
    const u8 *at = box + row * SCALE_ROW + step * SCALE_BYTES;
    if constexpr (SCALE == 3) return levels.values[*at] * *(const float *)(box + OUTS * SCALE_ROW + row * 4) + levels.offset;
    else if constexpr (SCALE == 2) return *(const float *)at;
    else if constexpr (SCALE == 1) return widen_f16(*(const u16 *)at);
    else return bits_float((u32)*(const u16 *)at << 16);
}

// x of a step for a lane, in the order of the operands, and the sums by column that products of codes begin from.
struct Operand {
    uint4 x[UNITS][RT];
    float from[RT][2];
};
DEVICE void load_x(Operand &o, const u8 *x, int step, int lane) {
    int row = lane >> 2, column = step * STEP + (lane & 3) * CHUNK;
#pragma unroll
    for (int n = 0; n < RT; n++) {
        float sums[2][4] = {};
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
            int unit = (column & 63) / 8 + u;
            uint4 v = *(const uint4 *)(x + (column >> 6) * X_BOX + (8 * n + row) * 128 + ((unit ^ row) << 4));
            if (INTEGERS) {
                v = make_uint4(permute(v.x, v.z, 0x5410), permute(v.x, v.z, 0x7632), permute(v.y, v.w, 0x5410), permute(v.y, v.w, 0x7632));
                if (PLACES_FOUR) v = make_uint4(scale_by(v.x, LARGER), scale_by(v.y, LESS), scale_by(v.z, LARGER), scale_by(v.w, LESS));
                multiply(sums[0], minus_of(0), minus_of(0), minus_of(1), minus_of(1), v.x, v.y);
                multiply(sums[1], minus_of(2), minus_of(2), minus_of(3), minus_of(3), v.z, v.w);
            }
            o.x[u][n] = v;
        }
        o.from[n][0] = sums[0][0] + sums[1][0], o.from[n][1] = sums[0][1] + sums[1][1];
    }
}

// The four operands of a unit.
DEVICE void take(u32 (&pairs)[4], u32 word, const Table &table) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if constexpr (CODEBOOK) pairs[i] = look_up(table, word, i);
        else pairs[i] = word >> (4 * i - lies_at(i)) & both(15u << lies_at(i));
    }
}

// Which of eight outs a lane takes: so that lanes that read together find theirs in all banks.
DEVICE int out_of(int lane) { return (lane >> 2 & 1) << 2 | (lane >> 2 & 2) | lane >> 4; }

DEVICE void load_codes(u32 (&words)[WORDS], const u8 *row, int step, int out, int lane) {
    int at = step * (STEP / 2) + (lane & 3) * (CHUNK / 2);  // of a row's 128 bytes
    const u8 *from = row + ((at >> 4 ^ out) << 4 | at & 15);
    if constexpr (WORDS == 4) {
        uint4 v = *(const uint4 *)from;
        words[0] = v.x, words[1] = v.y, words[WORDS - 2] = v.z, words[WORDS - 1] = v.w;
    } else if constexpr (WORDS == 2) {
        uint2 v = *(const uint2 *)from;
        words[0] = v.x, words[WORDS - 1] = v.y;
    } else {
        words[0] = *(const u32 *)from;
    }
}

// The sums of a box: rows 2 t and 2 t + 1 of each eight with outs g and g + 8 of each sixteen.
DEVICE void add_box(float (&sums)[MT][RT][4], const u8 *codes, const u8 *x, const u8 *scales, const Table &table, const Levels &levels, int first, int lane) {
    int out = out_of(lane);
#pragma unroll 1
    for (int s = 0; s < STEPS; s++) {
        Operand o;
        load_x(o, x, s, lane);
#pragma unroll
        for (int m = 0; m < MT; m += PAIR) {
            float part[PAIR][RT][4];
            u32 words[PAIR][2][WORDS];
            int row = first + 16 * m + out;
#pragma unroll
            for (int i = 0; i < 2 * min(PAIR, MT - m); i++) load_codes(words[i / 2][i % 2], codes + (row + 8 * i) * 128, s, out, lane);
#pragma unroll
            for (int u = 0; u < UNITS; u++) {
                u32 top[PAIR][4], bottom[PAIR][4];
#pragma unroll
                for (int i = 0; i < min(PAIR, MT - m); i++) take(top[i], words[i][0][u], table), take(bottom[i], words[i][1][u], table);
#pragma unroll
                for (int i = 0; i < min(PAIR, MT - m); i++)
#pragma unroll
                    for (int n = 0; n < RT; n++) {
                        if (u == 0) multiply_from(part[i][n], o.from[n][0], o.from[n][1], top[i][0], bottom[i][0], top[i][1], bottom[i][1], o.x[u][n].x, o.x[u][n].y);
                        else multiply(part[i][n], top[i][0], bottom[i][0], top[i][1], bottom[i][1], o.x[u][n].x, o.x[u][n].y);
                    }
#pragma unroll
                for (int i = 0; i < min(PAIR, MT - m); i++)
#pragma unroll
                    for (int n = 0; n < RT; n++) multiply(part[i][n], top[i][2], bottom[i][2], top[i][3], bottom[i][3], o.x[u][n].z, o.x[u][n].w);
            }
#pragma unroll
            for (int i = 0; i < 2 * min(PAIR, MT - m); i++) {
                float scale = scale_at(scales, row + 8 * i, s, levels);
#pragma unroll
                for (int n = 0; n < RT; n++)
#pragma unroll
                    for (int e = 2 * (i % 2); e < 2 * (i % 2) + 2; e++) sums[m + i / 2][n][e] += scale * part[i / 2][n][e];
            }
        }
    }
}

DEVICE void store4(const Params &p, int row, int out, const float4 &v) {
    if (row >= p.rows || out >= p.outs) return;
    float y[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (p.bias) y[i] += widen(p.bias[min(out + i, p.outs - 1)]);
    u16 *to = p.y + (long long)row * p.outs + out;
    if (p.outs % 4 == 0) {
        *(uint2 *)to = make_uint2(round_pair(y[0], y[1]), round_pair(y[2], y[3]));
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (out + i < p.outs) to[i] = (u16)round_pair(y[i], y[i]);
}
struct Inbox {
    float *sums;
    u64 *full;
};
DEVICE void add(float4 &sum, const float4 &v) { sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w; }

// The warps' sums, [across][row][out], become the block's, of which each block of the cluster gets a share from all, in its
// inbox: [rank][row][share].
DEVICE void finish(const Params &p, const float *places, const Inbox &inbox, int first_out, int rank, int tid) {
#pragma unroll 1
    for (int i = tid; i < ROWS * OUTS / 4; i += THREADS) {
        int row = i / (OUTS / 4), out = i % (OUTS / 4) * 4;
        float4 sum = *(const float4 *)(places + row * PITCH + out);
#pragma unroll
        for (int w = 1; w < ACROSS; w++) add(sum, *(const float4 *)(places + w * PLACE + row * PITCH + out));
        if (SPLITS == 1) store4(p, row, first_out + out, sum);
        else send(inbox.sums + (rank * ROWS + row) * SHARE + out % SHARE, sum, inbox.full, out / SHARE);
    }
#if SPLITS > 1
    if (rank * SHARE >= OUTS) return;
    await_cluster(inbox.full, 0);
#pragma unroll 1
    for (int i = tid; i < ROWS * SHARE / 4; i += THREADS) {
        int row = i / (SHARE / 4), out = i % (SHARE / 4) * 4;
        if (row >= p.rows || rank * SHARE + out >= OUTS) continue;
        float4 sum = *(const float4 *)(inbox.sums + row * SHARE + out);
#pragma unroll
        for (int k = 1; k < SPLITS; k++) add(sum, *(const float4 *)(inbox.sums + (k * ROWS + row) * SHARE + out));
        store4(p, row, first_out + rank * SHARE + out, sum);
    }
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) slab(KERNEL_ARGUMENT Params p) {
    extern __shared__ uint4 shared[];  // table, up to 1,024 bytes, codes, x, levels, scales, inbox, barriers
    int tid = threadIdx.x, lane = tid & 31, across = (tid >> 5) % ACROSS, along = (tid >> 5) / ACROSS, first = along * HEIGHT;
    u8 *codes = (u8 *)(shared + TABLE) + (-shared_address(shared) & 1023), *x = codes + SLOTS * CODES;
    float *levels = (float *)(x + SLOTS * X);
    u8 *scales = (u8 *)(levels + (SCALE == 3 ? 256 : 0));
    Inbox inbox = {(float *)(scales + SLOTS * SCALE_BOX), (u64 *)(scales + SLOTS * SCALE_BOX + INBOX * SPLITS * ROWS * SHARE * 4)};
    u64 *full = inbox.full + 2 * INBOX, *empty = full + SLOTS;
    int rank = SPLITS > 1 ? (int)cluster_rank() : 0, boxes = p.columns / SPAN, share = (boxes + SPLITS - 1) / SPLITS;
    int begin = rank * share, mine = max(min(share, boxes - begin), 0);
    Ring r = {codes + across * CODES, x + across * X, scales + across * SCALE_BOX, full + across, empty + across,
              (int)blockIdx.x / SPLITS * OUTS, (begin + across) * SPAN, (mine - across + ACROSS - 1) / ACROSS};
    int own = max(min(OUTS - rank * SHARE, SHARE), 0), began = 0;
    bool asks = lane == 0 && along == 0;
    int ahead = min(r.count, STAGES);
    next_may_begin();
    if (asks) {
#pragma unroll
        for (int i = 0; i < STAGES; i++) make_barrier(r.full + i * ACROSS, 1), make_barrier(r.empty + i * ACROSS, ALONG);
        if (INBOX && across == 0) make_barrier(inbox.full, 1);
        publish_barriers();
        if (INBOX && across == 0) expect(inbox.full, SPLITS * ROWS * own * 4);
#pragma unroll 1
        for (int i = 0; i < ahead; i++) ask_codes(p, r, i);
    }
    __syncwarp();
    if (INBOX) began = begin_cluster();
#pragma unroll
    for (int i = 0; i < STAGES; i++) ask_scales(p, r, i, first, lane);
    if (CODEBOOK) fill_table(shared, p.table, THREADS);
    if (SCALE == 3)
        for (int i = tid; i < 256; i += THREADS) levels[i] = p.scales.levels[i];
    Levels of_scales = {levels, SCALE == 3 ? *p.scales.offset : 0.0f};
    Table table = {(const u8 *)shared, (u32)lane * 4};
    if (asks) {
        previous_done();
#pragma unroll 1
        for (int i = 0; i < ahead; i++) ask_x(p, r, i);
    }
    __syncthreads();
    table.lane = kept(table.lane + shared_place(shared) - BEGINS);  // a block of a cluster has addresses of its own

    float sums[MT][RT][4] = {};
#pragma unroll 1
    for (int box = 0; box < r.count; box++) {
        int slot = box % STAGES * ACROSS, phase = box / STAGES & 1;
        copies_left<STAGES - 1>();
        await(r.full + slot, phase);
        __syncwarp();
        add_box(sums, r.codes + slot * CODES, r.x + slot * X, r.scales + slot * SCALE_BOX, table, of_scales, first, lane);
        __syncwarp();
        if (box + STAGES < r.count) {
            if (lane == 0) arrive(r.empty + slot);
            if (asks) {
                await(r.empty + slot, phase);
                ask_codes(p, r, box + STAGES), ask_x(p, r, box + STAGES);
            }
            __syncwarp();
        }
        ask_scales(p, r, box + STAGES, first, lane);
    }
    __syncthreads();  // nobody reads the stages any more
    float *places = (float *)codes, *place = places + across * PLACE;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < RT; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                place[(8 * n + 2 * (lane & 3) + (e & 1)) * PITCH + first + 16 * m + out_of(lane) + 8 * (e >> 1)] = WHOLE * sums[m][n][e];
    __syncthreads();
    if (INBOX) cluster_began(began);
    finish(p, places, inbox, r.out, rank, tid);
}
