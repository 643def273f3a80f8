// Scales of few.cu: they stay as they were loaded until their step is due. In EVEN cuts those of a round come in one.

struct Raw {  // a scale as it is stored
    u32 bits;
    float absmax;
};
// Which of a step's groups a lane's scales belong to.
DEVICE int group_of(int lane, int kind) { return SCALED ? (lane & 3) * SPREAD / 4 : (2 * (lane & 3) + kind) % SPREAD; }

DEVICE Raw load_raw(const Scales &p, int out, int group) {
    long long index = (long long)out * p.groups + group;
#if SCALE == 3
    return {p.codes[index], ((const float *)p.scale)[index >> 8]};
#elif SCALE == 2
    return {0, ((const float *)p.scale)[index]};
#else
    return {((const u16 *)p.scale)[index], 0};
#endif
}
DEVICE float scale_of(const Raw &raw, const float *levels, float offset) {
#if SCALE == 3
    return levels[raw.bits] * raw.absmax + offset;
#elif SCALE == 2
    return raw.absmax;
#elif SCALE == 1
    return widen_f16(raw.bits);
#else
    return bits_float(raw.bits << 16);
#endif
}

struct Round {  // the scales of AHEAD steps of two rows of W, as they are stored
    u32 bits[2][SCALE_WORDS];
    float absmax[2];
};
DEVICE void load_round(Round &round, const Scales (&of)[GATED + 1], const int (&outs)[2], int group) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const Scales &scales = of[GATED * h];
        long long index = (long long)outs[h] * scales.groups + group;
        const u8 *from = (SCALE == 3 ? scales.codes : (const u8 *)scales.scale) + index * SCALE_BYTES;
        if constexpr (SCALE_WORDS % 4 == 0) {
#pragma unroll
            for (int i = 0; i < SCALE_WORDS; i += 4) {
                uint4 v = load16(from + 4 * i);
                u32(&to)[SCALE_WORDS] = round.bits[h];
                to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
            }
        } else if constexpr (SCALE_WORDS == 2) {
            uint2 v = load8(from);
            round.bits[h][0] = v.x, round.bits[h][1] = v.y;
        } else {
            round.bits[h][0] = load4(from);
        }
        if (SCALE == 3) round.absmax[h] = ((const float *)scales.scale)[index >> 8];
    }
}
DEVICE Raw raw_at(const Round &round, int h, int j) {
    if (SCALE == 2) return {0, bits_float(round.bits[h][j % SCALE_WORDS])};
    constexpr int PER_WORD = 4 / SCALE_BYTES;
    u32 word = round.bits[h][j / PER_WORD % SCALE_WORDS] >> (8 * SCALE_BYTES * (j % PER_WORD));
    return {word & (SCALE == 3 ? 0xFFu : 0xFFFFu), round.absmax[h]};
}
// Of a round's step, for the lane's columns 2 t, 2 t + 1 of a product, or for its codes where these are SCALED.
DEVICE Raw raw_of(const Round &round, int h, int step, int kind, int lane) {
    Raw found[SPREAD];
#pragma unroll
    for (int group = 0; group < SPREAD; group++) found[group] = raw_at(round, h, step * SPREAD + group);
    if constexpr (SPREAD == 1) return found[0];
    else if constexpr (SCALED) {
        Raw first = lane & (SPREAD == 2 ? 2 : 1) ? found[1] : found[0];
        if (SPREAD == 2) return first;
        Raw second = lane & 1 ? found[SPREAD - 1] : found[SPREAD - 2];
        return lane & 2 ? second : first;
    } else {
        return SPREAD == 4 && lane & 1 ? found[SPREAD - 2 + kind] : found[kind];
    }
}
