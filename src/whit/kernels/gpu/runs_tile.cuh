// A tile of 16 outs of one of ggml's types in runs_row.cu: its scales and its codes. The host defines
//   RUN, SUBS          columns of a run (16 or 32, or a multiple); runs of a superblock, 0: there are none
//   PART, SCALE_BIAS   bits of a run's integers, and what was added to those of d
//   NUMBER             what d is: 1 float16, 4: a byte, the power of two that is twice d
//   LESS               0 no minimum, 1: m, a number of the run, is added, 2: dmin times an integer is taken off

constexpr int THREADS = 32 * WARPS, OUTS = 16;
constexpr int EACH = RUN == 16 ? 2 : 1;              // runs of a chunk
constexpr int FIELDS = 4;                            // d, dmin or m, integers of d, integers of dmin

struct Params {
    const u8 *codes, *field[FIELDS];
    const u16 *levels, *x, *bias;  // levels: 16 operands; bias: or null
    u16 *y;
    int pitch[FIELDS];             // bytes of a row of W; 0: there is no such field
    int outs, columns, rows, row_bytes;
};
struct Held {
    u32 words[2][WORDS];  // rows 8 apart
};
struct Run {
    float scale[EACH], less[EACH];
};

DEVICE int slot_bytes(const Params &p) { return OUTS * (p.pitch[0] + p.pitch[1] + p.pitch[2] + p.pitch[3]) + 16; }

// The scales of a tile, 16 bytes at a time where the weight does not end before.
DEVICE void copy_scales(u8 *slot, const Params &p, int tile) {
#pragma unroll
    for (int f = 0; f < FIELDS; f++) {
        int bytes = OUTS * p.pitch[f];
        const u8 *from = p.field[f] + (long long)tile * bytes;
        if ((tile + 1) * OUTS <= p.outs) {
#pragma unroll 1
            for (int i = threadIdx.x * 16; i < bytes; i += THREADS * 16) copy_behind(slot + i, from + i);
        } else {
            int left = (p.outs - tile * OUTS) * p.pitch[f];
#pragma unroll 1
            for (int i = threadIdx.x; i < left; i += THREADS) slot[i] = from[i];
        }
        slot += bytes;
    }
}

DEVICE float number_of(const u8 *row, int index) {
#if NUMBER == 4
    u32 e = row[index];
    return bits_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);
#else
    return widen_f16(((const u16 *)row)[index]);
#endif
}
// The integers of a chunk's runs, side by side.
DEVICE u32 integers_of(const u8 *row, int chunk) {
    constexpr int BITS_EACH = EACH * PART;
    if constexpr (BITS_EACH == 16) return ((const u16 *)row)[chunk];
    if constexpr (BITS_EACH == 8) return row[chunk];
    int bit = chunk * BITS_EACH;
    return (row[bit >> 3] | (u32)row[(bit >> 3) + 1] << 8) >> (bit & 7);
}
DEVICE float integer_at(u32 all, int i, float bias) {
    return bits_float(under_exponent(all >> i * PART, (1u << PART) - 1, 0x4B000000u)) - (8388608.0f + bias);
}
DEVICE Run run_of(const u8 *slot, const Params &p, int row, int chunk) {
    Run run;
    const u8 *field[FIELDS];
#pragma unroll
    for (int f = 0; f < FIELDS; f++) field[f] = slot + row * p.pitch[f], slot += OUTS * p.pitch[f];
#if SUBS
    int super = chunk * CHUNK / (SUBS * RUN);
    float d = number_of(field[0], super), dmin = LESS ? number_of(field[1], super) : 0.0f;
    u32 scales = integers_of(field[2], chunk), mins = LESS ? integers_of(field[3], chunk) : 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        run.scale[i] = multiplied(d, integer_at(scales, i, SCALE_BIAS));
        run.less[i] = LESS ? multiplied(dmin, integer_at(mins, i, 0)) : 0.0f;
    }
#else
    int index = chunk * CHUNK / RUN;
    run.scale[0] = number_of(field[0], index);
    run.less[0] = LESS ? -number_of(field[1], index) : 0.0f;
#endif
    return run;
}

DEVICE void load_held(Held &held, const Params &p, int tile, int chunk, int lane) {
    chunk = min(chunk, p.columns / CHUNK - 1);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int out = min(tile * OUTS + h * 8 + (lane >> 2), p.outs - 1);
        load_words(held.words[h], (const u32 *)(p.codes + (long long)out * p.row_bytes + chunk * (4 * WORDS)));
    }
}
DEVICE void begin_tile(Held (&held)[AHEAD], const Params &p, int tile, int steps) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
#pragma unroll
    for (int j = 0; j < AHEAD; j++)
        if (warp + j * WARPS < steps) load_held(held[j], p, tile, (warp + j * WARPS) * 4 + (lane & 3), lane);
}
