// A thread's sums: per tile of 8 rows, rows 2 t and 2 t + 1 with its two rows of W; and x's own.
struct Sums {
    float all[NT][4], x[NT][2];
};

// Where codes are PAIRED, lanes whose second bit is 0 hold 16 bytes of the upper row and give away the last eight.
DEVICE void exchange(Held &held, int lane) {
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
        u32 lower = lane & 2, give = lower ? held.words[0][i] : held.words[1][i];
        u32 got = float_bits(from_lane(bits_float(give), 2));
        if (lower) held.words[0][i] = got;
        else held.words[1][i] = got;
    }
}

// The sums of a step get their scales, and what the operands had besides is taken off.
DEVICE void scale_step(Sums &sums, float (&part)[NT][4], const Held &held, const Raw (&raw)[2][KINDS], const Shared &s, const Rows &rows, int step, int lane) {
#pragma unroll
    for (int n = 0; n < NT; n++) {
        if (SUMMED) {
            const float *of_x = s.sums + step * V + 8 * n;
            float first = of_x[min(2 * (lane & 3), V - 1)], second = of_x[min(2 * (lane & 3) + 1, V - 1)];
#if STEPS_PER_GROUP
#pragma unroll
            for (int h = 0; h < 2; h++) {
                part[n][2 * h] -= (BIAS + (ZERO ? held.zero[h][0] : 0.0f)) * first;
                part[n][2 * h + 1] -= (BIAS + (ZERO ? held.zero[h][KINDS - 1] : 0.0f)) * second;
            }
#else
            sums.x[n][0] += first, sums.x[n][1] += second;
#endif
        }
#if STEPS_PER_GROUP
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
            for (int e = 0; e < 2; e++)
                sums.all[n][2 * h + e] += scale_of(raw[h][e % KINDS], s.levels, rows.offset[GATED * h]) * part[n][2 * h + e];
        }
#endif
    }
}

// The operands of a unit of one row.
DEVICE void operands(u32 (&pairs)[4], const Held &held, const Raw (&raw)[2][KINDS], int h, int unit, const Shared &s, const Rows &rows) {
    decode<HAS_RAW && (!SCALED || BARE)>(pairs, held.words[h], unit, s.table);
#if BARE
    scale_bare(pairs, unit, scale_of(raw[h][0], s.levels, rows.offset[GATED * h]));
#elif SCALED
    scale_pairs(pairs, scale_of(raw[h][0], s.levels, rows.offset[GATED * h]), held.zero[h][0]);
#endif
}

DEVICE void add_step(Sums &sums, Held &held, const Raw (&raw)[2][KINDS], const Shared &s, const Rows &rows, int step, int lane) {
    if (PAIRED) exchange(held, lane);
#if STEPS_PER_GROUP
    float apart[NT][4] = {};
    float(&part)[NT][4] = SCALED ? sums.all : apart;
#else
    float(&part)[NT][4] = sums.all;
#endif
    u32 x = s.x + step * (16 * PER_STEP);
#pragma unroll
    for (int unit = 0; unit < UNITS; unit++) {
        u32 top[4], bottom[4];
        operands(top, held, raw, 0, unit, s, rows);
        operands(bottom, held, raw, 1, unit, s, rows);
#pragma unroll
        for (int n = 0; n < NT; n++) {
            uint4 b = shared_if(s.has_x, x + (unit * ROWS + 8 * n) * 64);
            multiply(part[n], top[0], bottom[0], top[1], bottom[1], b.x, b.y);
            multiply(part[n], top[2], bottom[2], top[3], bottom[3], b.z, b.w);
        }
    }
    if (!SCALED) scale_step(sums, part, held, raw, s, rows, step, lane);
}

// Where a row has one scale it comes last.
DEVICE void scale_sums(Sums &sums, const Rows &rows) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float scale = load_scale(rows.scales[GATED * h], rows.out[h], 0);
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) sums.all[n][2 * h + e] = scale * (sums.all[n][2 * h + e] - BIAS * sums.x[n][e]);
    }
}
