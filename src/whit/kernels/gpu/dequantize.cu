// W (outs, columns) from its codes, in bfloat16 or float16: (code - OFFSET - zero) * scale, or level[code] * scale, in
// float32 and rounded once, as the reference does. Built after common.cuh; a thread decodes eight columns at a time,
// which are BITS bytes, and writes them as 16. A table of 16 levels has no bank conflicts in shared memory. Macros:
//   ALIGNED            the codes of eight columns can be read as one word
//   WHOLE              rows are whole units of eight columns
//   GROUPS_INSIDE      a group may begin inside a unit

struct Params {
    const u8 *codes;
    Scales scales;
    const float *table;  // CODEBOOK: 2^BITS levels
    u16 *w;
    int outs, columns, row_bytes, group_size, rows_per_block;
};

constexpr int THREADS = 256;
constexpr int BATCH = 4;  // loads under way per thread

DEVICE unsigned long long load_unit(const u8 *p, int bytes) {
    unsigned long long v = 0;
#pragma unroll
    for (int i = 0; i < BITS; i++)
        if (i < bytes) v |= (unsigned long long)p[i] << (8 * i);
    return v;
}

DEVICE unsigned long long load_aligned(const u8 *p) {
    if constexpr (BITS == 8) {
        uint2 v = load8(p);
        return v.x | (unsigned long long)v.y << 32;
    } else if constexpr (BITS == 4) {
        return load4(p);
    } else if constexpr (BITS == 2) {
        return *(const u16 *)p;
    } else {
        return load_unit(p, BITS);
    }
}

struct Unit {  // eight columns
    int row, column;
    unsigned long long bits;
    float scale, zero;
};

DEVICE void load(Unit &unit, const Params &p, u32 index, u32 units, int first) {
    unit.row = first + index / units, unit.column = index % units * 8;
    const u8 *from = p.codes + (long long)unit.row * p.row_bytes + unit.column / 8 * BITS;
    unit.bits = ALIGNED ? load_aligned(from) : load_unit(from, p.row_bytes - unit.column / 8 * BITS);
    int group = p.group_size ? unit.column / p.group_size : 0;
    unit.scale = load_scale(p.scales, unit.row, group), unit.zero = load_zero(p.scales, unit.row, group);
}

DEVICE void decode(const Unit &unit, const Params &p, const float *table) {
    float w[8], scale = unit.scale, zero = unit.zero;
#pragma unroll
    for (int k = 0; k < 8; k++) {
        int column = unit.column + k;
        if (GROUPS_INSIDE && column % p.group_size == 0 && column < p.columns) {  // a group may begin inside
            scale = load_scale(p.scales, unit.row, column / p.group_size);
            zero = load_zero(p.scales, unit.row, column / p.group_size);
        }
        u32 code = (u32)(unit.bits >> (BITS * k)) & ((1u << BITS) - 1);
        w[k] = (CODEBOOK ? table[code] : (float)((int)code - OFFSET) - zero) * scale;
    }
    u32 pairs[4];
#pragma unroll
    for (int k = 0; k < 4; k++) pairs[k] = round_pair(w[2 * k], w[2 * k + 1]);
    u16 *to = p.w + (long long)unit.row * p.columns + unit.column;
    if (WHOLE) {
        *(uint4 *)to = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        return;
    }
#pragma unroll
    for (int k = 0; k < 8; k++)
        if (unit.column + k < p.columns) to[k] = (u16)(pairs[k / 2] >> (16 * (k % 2)));
}

extern "C" __global__ void __launch_bounds__(THREADS) dequantize(const Params p) {
    extern __shared__ uint4 shared[];
    float *table = (float *)shared;
    if (CODEBOOK) {
        for (int i = threadIdx.x; i < 1 << BITS; i += THREADS) table[i] = p.table[i];
        __syncthreads();
    }
    u32 units = (p.columns + 7) / 8, first = blockIdx.x * p.rows_per_block;
    u32 count = min(p.rows_per_block, p.outs - (int)first) * units;
#pragma unroll 1
    for (u32 i = threadIdx.x; i < count; i += BATCH * THREADS) {
        Unit held[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; b++)
            if (i + b * THREADS < count) load(held[b], p, i + b * THREADS, units, first);
#pragma unroll
        for (int b = 0; b < BATCH; b++)
            if (i + b * THREADS < count) decode(held[b], p, table);
    }
}
