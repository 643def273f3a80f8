// One block per sequence: its likeliest token, of equal ones the first, is the next step's input and a column of `chosen`;
// where it has ended that is padding. Built after common.cuh. Macro: THREADS.

struct Params {
    const u16 *logits;                // (batch, vocabulary), a multiple of 8
    const long long *stops, *padding; // STOPS tokens that end a sequence, and one
    u8 *ended;                        // (batch)
    long long *chosen;                // (batch, length)
    long long *column, *tokens;       // (batch)
    int vocabulary, length;
};

constexpr int STOPS = 8, WARPS = THREADS / 32;

struct Best {
    float value;
    u32 token;
};
DEVICE void take(Best &best, float value, u32 token) {
    if (value > best.value || (value == best.value && token < best.token)) best.value = value, best.token = token;
}
DEVICE void take_lanes(Best &best) {
#pragma unroll
    for (int flip = 16; flip; flip /= 2) {
        float value = from_lane(best.value, flip);
        take(best, value, float_bits(from_lane(bits_float(best.token), flip)));
    }
}

DEVICE Best best_of(const uint4 *logits, int units) {
    Best best = {-1e38f * 1e38f, 0};
#pragma unroll 8
    for (int unit = threadIdx.x; unit < units; unit += THREADS) {
        uint4 v = logits[unit];
        u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            take(best, widen(pairs[i] & 0xFFFF), 8 * unit + 2 * i);
            take(best, widen(pairs[i] >> 16), 8 * unit + 2 * i + 1);
        }
    }
    take_lanes(best);
    return best;
}

extern "C" __global__ void __launch_bounds__(THREADS) choose(const Params p) {
    extern __shared__ uint4 shared[];
    next_may_begin(), previous_done();
    Best *bests = (Best *)shared;
    int row = blockIdx.x;
    Best best = best_of((const uint4 *)(p.logits + (long long)row * p.vocabulary), p.vocabulary / 8);
    if (threadIdx.x % 32 == 0) bests[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    best = bests[threadIdx.x % WARPS];
    take_lanes(best);
    if (threadIdx.x) return;
    long long token = p.ended[row] ? *p.padding : best.token, column = p.column[row];
    for (int i = 0; i < STOPS; i++)
        if (token == p.stops[i]) p.ended[row] = 1;
    if (column < p.length) p.chosen[row * (long long)p.length + column] = token;
    p.column[row] = column + 1, p.tokens[row] = token;
}
