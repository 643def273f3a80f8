// The RMS norm of a row of COLUMNS by a block of THREADS, rounded where the modules of transformers round: the row over the
// root of its mean square, then times weight.
#ifndef ADDED
#define ADDED 0  // 1: `added` is added to the row first, rounded, and the sum written where the row was
#endif
constexpr int ROW_UNITS = COLUMNS / 8;
constexpr int ROW_HELD = (ROW_UNITS + THREADS - 1) / THREADS;  // units of eight columns per thread

DEVICE u32 word_at(const uint4 &v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
DEVICE u32 multiply_pair(u32 a, float factor) { return round_pair(widen(a & 0xFFFF) * factor, widen(a >> 16) * factor); }

// Nothing that a step of a model writes, so it is read before what is waited for is there.
DEVICE void load_weights(uint4 (&weights)[ROW_HELD], const u16 *weight) {
#pragma unroll
    for (int h = 0; h < ROW_HELD; h++) weights[h] = ((const uint4 *)weight)[min(h * THREADS + (int)threadIdx.x, ROW_UNITS - 1)];
}

// A thread holds the norm of its units afterwards, zeros beyond the last; `sums`: shared memory, a number for each warp.
DEVICE void norm_row(uint4 (&held)[ROW_HELD], uint4 *row, const uint4 *added, const uint4 (&weights)[ROW_HELD], float epsilon, float *sums) {
    float sum = 0;
#pragma unroll
    for (int h = 0; h < ROW_HELD; h++) {
        int unit = h * THREADS + threadIdx.x;
        held[h] = make_uint4(0, 0, 0, 0);
        if (unit >= ROW_UNITS) continue;
        uint4 v = row[unit];
#if ADDED
        uint4 a = added[unit];
        row[unit] = v = make_uint4(add_pair(v.x, a.x), add_pair(v.y, a.y), add_pair(v.z, a.z), add_pair(v.w, a.w));
#endif
        held[h] = v;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float low = widen(word_at(v, i) & 0xFFFF), high = widen(word_at(v, i) >> 16);
            sum += low * low + high * high;
        }
    }
#pragma unroll
    for (int flip = 16; flip; flip /= 2) sum += from_lane(sum, flip);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    float total = 0;
#pragma unroll
    for (int i = 0; i < THREADS / 32; i++) total += sums[i];
    float factor = inverse_root(total * (1.0f / COLUMNS) + epsilon);
#pragma unroll
    for (int h = 0; h < ROW_HELD; h++) {
        u32 out[4];
#pragma unroll
        for (int i = 0; i < 4; i++) out[i] = scale_by(multiply_pair(word_at(held[h], i), factor), word_at(weights[h], i));
        held[h] = make_uint4(out[0], out[1], out[2], out[3]);
    }
}
