// The end of a product: a block's sums become rows of y, or a part of them that the last block adds up.

struct Params {
    const u32 *codes;
    Scales scales;
    const u16 *table;           // CODEBOOK: 16 levels as operands
    const u16 *x;
    const u16 *bias;            // or null
    u16 *y;
    float *partial;             // (splits, rows, outs) where there are several
    u32 *arrived;               // zeros, one per block of outs and rows; left at zero
    int outs, columns, rows, row_words, split_steps;
};

DEVICE u32 rounded(const Params &p, int out, float value) {  // twice
    if (p.bias) value += widen(p.bias[out]);
    return round_pair(value, value);
}
DEVICE void store(const Params &p, int row, int out, float value) {
    p.y[(long long)row * p.outs + out] = (u16)rounded(p, out, value);
}

// What the splits have for some of a block's results, many on their way at a time: one after the other they would take
// longer than the product.
constexpr int AT_ONCE = 8;
DEVICE void add_splits(const Params &p, int first, int apart, int outs, int rows, int first_out, int first_row, int splits) {
    const float *from[AT_ONCE];
    float sum[AT_ONCE] = {};
#pragma unroll
    for (int b = 0; b < AT_ONCE; b++) {
        int i = min(first + b * apart, rows * outs - 1);
        from[b] = p.partial + (long long)(first_row + i / outs) * p.outs + min(first_out + i % outs, p.outs - 1);
    }
#pragma unroll 2
    for (int k = 0; k < splits; k++)
#pragma unroll
        for (int b = 0; b < AT_ONCE; b++) sum[b] += load_uncached(from[b] + (long long)k * p.rows * p.outs);
#pragma unroll
    for (int b = 0; b < AT_ONCE; b++) {
        int i = first + b * apart, out = first_out + i % outs;
        if (i < rows * outs && out < p.outs) store(p, first_row + i / outs, out, sum[b]);
    }
}

// The sums of a block lie in shared memory, (rows, stride); all of its threads come here after a barrier.
DEVICE void finish(const Params &p, float *sums, int stride, int outs, int first_row, int rows, int threads) {
    int tid = threadIdx.x, splits = gridDim.y, first_out = blockIdx.x * outs;
#pragma unroll 4
    for (int i = tid; i < rows * outs; i += threads) {
        int row = first_row + i / outs, out = first_out + i % outs;
        float value = sums[i / outs * stride + i % outs];
        if (out >= p.outs) continue;
        if (splits == 1) store(p, row, out, value);
        else p.partial[((long long)blockIdx.y * p.rows + row) * p.outs + out] = value;
    }
    if (splits == 1) return;

    // The last block to arrive adds the splits, always in the same order.
    __threadfence();
    __syncthreads();
    u32 *ticket = (u32 *)sums, *arrived = p.arrived + blockIdx.z * gridDim.x + blockIdx.x;
    if (tid == 0) *ticket = atomicAdd(arrived, 1u);
    __syncthreads();
    if (*ticket != splits - 1) return;
    __threadfence();
#pragma unroll 1
    for (int first = tid; first < rows * outs; first += AT_ONCE * threads) add_splits(p, first, threads, outs, rows, first_out, first_row, splits);
    if (tid == 0) *arrived = 0;
}
