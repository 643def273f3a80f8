// W (outs, columns) in bfloat16 or float16 from codes whose scales belong to runs of columns, equal to the reference bit
// for bit. Built after common.cuh; runs.cuh says what the host defines. Four threads share a chunk of 32 columns: each
// reads its words, which lie in the first cache by then, and writes eight columns of it.
#include "runs.cuh"

struct Params {
    Weight w;
    u16 *to;
};

constexpr int THREADS = 256;
constexpr int PART_WORDS = (8 * BITS + 31) / 32;  // of eight columns

// Word `i` of the eight columns from 8 part on.
DEVICE u32 part_word(const u32 (&words)[WORDS], int part, int i) {
    u32 found = 0;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        int bit = k * 8 * BITS + 32 * i, at = bit >> 5;
        u32 word = joined(words[at % WORDS], words[(at + 1) % WORDS], bit & 31);
        found = part == k ? word : found;
    }
    return found;
}

extern "C" __global__ void __launch_bounds__(THREADS) runs_dequantize(const Params p) {
    extern __shared__ uint4 shared[];
    fill_tables(shared, p.w, THREADS);
    __syncthreads();
    long long chunks = p.w.columns / CHUNK, all = chunks * p.w.outs;
    int part = threadIdx.x & 3;
    for (long long i = ((long long)blockIdx.x * THREADS + threadIdx.x) >> 2; i < all; i += ((long long)gridDim.x * THREADS) >> 2) {
        int out = i / chunks, chunk = i % chunks;
        Chunk held;
        load_chunk(held, p.w, out, chunk);
        Run run = run_of(p.w, out, RUN ? chunk * CHUNK / RUN + (PARTS > 1 ? part >> 1 : 0) : 0);
        u32 words[WORDS], mine[PART_WORDS], pairs[4];
        unpack(words, held, (const u16 *)shared);
#pragma unroll
        for (int k = 0; k < PART_WORDS; k++) mine[k] = part_word(words, part, k);
#pragma unroll
        for (int k = 0; k < 4; k++)
            pairs[k] = round_pair(decoded(mine, 2 * k, run, (const float *)shared), decoded(mine, 2 * k + 1, run, (const float *)shared));
        *(uint4 *)(p.to + (long long)out * p.w.columns + chunk * CHUNK + part * 8) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
}
