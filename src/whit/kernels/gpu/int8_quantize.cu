// Rows of x (rows, columns) as int8 codes and a scale: codes = round(x 127 / max|x|), as kernels/int8.py defines.
//
// The host (int8.py) defines THREADS of a block and CHUNKS of eight columns that a thread holds, so that a row is read
// once. With OUTLIERS, columns that int8_mark.cu has marked (a single row marks its own) get codes 0, count in no
// row's maximum, and are listed by the first block. With FLOAT8 codes are E4M3 floats: x 448 / max|x|, rounded.
//
// Few rows with outliers mark their columns themselves: they are all held by CLUSTER blocks, EACH rows by a block, which
// tell each other the columns. That takes less time than a launch.
#include "int8_warp.cuh"
#include "int8_cluster.cuh"

constexpr int WARPS = THREADS / 32;
constexpr float LARGEST = FLOAT8 ? 448 : 127;  // code

struct Params {
    const u16 *x;
    const u8 *marks;  // a bit for each column, or null: x is one row
    signed char *codes;
    float *scale;
    int *offset;  // of the rows' products with weights from 0 to 255 where they should be from -128 to 127
    int *listed;  // how many columns are outliers, then these
    float threshold;
    int rows, columns;
};

// The list, thread by thread: always in the same order.
DEVICE void list_columns(const Params &p, const u32 (&marks)[CHUNKS], u32 *turns) {
    int tid = threadIdx.x, warp = tid >> 5, count = 0, at = 0;
#pragma unroll
    for (int k = 0; k < CHUNKS; k++) count += count_bits(marks[k]);
    int upto = lanes_with(count > 0) ? warp_prefix(count) : 0;  // most warps have none
    if ((tid & 31) == 31) turns[warp] = upto;
    __syncthreads();
    if (count == 0 && tid != THREADS - 1) return;
    for (int i = 0; i < warp; i++) at += turns[i];
    at += upto;  // behind the thread's own
    if (tid == THREADS - 1) p.listed[0] = at;
    at -= count;
#pragma unroll
    for (int k = 0; k < CHUNKS; k++)
        for (u32 left = marks[k]; left; left &= left - 1)
            p.listed[++at] = (tid + k * THREADS) * 8 + count_bits((left & (0 - left)) - 1);
}

// Codes of a row's `chunks`; their sum, of those of this thread.
DEVICE int write_codes(signed char *codes, const uint4 (&held)[CHUNKS], float factor, int chunks) {
    int tid = threadIdx.x, sum = 0;
#pragma unroll
    for (int k = 0; k < CHUNKS; k++) {
        int chunk = tid + k * THREADS;
        uint2 words = FLOAT8 ? float8_of(held[k], factor) : codes_of(held[k], factor);
        if (chunk >= chunks) continue;
        sum = byte_sum(words.x, byte_sum(words.y, sum));
        *(uint2 *)(codes + chunk * 8) = words;
    }
    return sum;
}

#if CLUSTER > 1
static_assert(CLUSTER == 8 && OUTLIERS && !FLOAT8, "four lanes send to two blocks each");

struct Told {  // shared memory
    u64 sent;
    u32 largest[EACH][WARPS], turns[WARPS], words[WARPS];
    int sums[EACH][WARPS];
    u8 marks[THREADS * CHUNKS];  // a bit for each column in which some block has an outlier
};

// All blocks' marks, by every block. Bytes of four lanes each are a word, and few words are not 0.
DEVICE void join_marks(Told &t, u32 (&marks)[CHUNKS]) {
    int tid = threadIdx.x, quarter = tid & 3, count = 0;
#pragma unroll
    for (int k = 0; k < CHUNKS; k++) {
        u32 word = marks[k] << 8 * quarter;
        word |= exchange(word, 1);
        word |= exchange(word, 2);
        count += count_bits(lanes_with(word && quarter == 0));
        if (!word) continue;
        for (int r = 0; r < 2; r++) join((u32 *)(t.marks + (tid - quarter) + k * THREADS), word, 2 * quarter + r, &t.sent);
    }
    if ((tid & 31) == 0) t.words[tid >> 5] = count;
    __syncthreads();
    if (tid < CLUSTER) {
        count = 0;
        for (int i = 0; i < WARPS; i++) count += t.words[i];
        expect(&t.sent, 4 * count, tid);
    }
    await_sent(&t.sent, 0);
#pragma unroll
    for (int k = 0; k < CHUNKS; k++) marks[k] = t.marks[tid + k * THREADS];
}

extern "C" __global__ void __launch_bounds__(THREADS) int8_quantize(const Params p) {
    extern __shared__ uint4 shared[];
    Told &t = *(Told *)shared;
    int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, chunks = p.columns / 8, first = cluster_rank() * EACH;
    if (tid == 0) {
        make_barrier(&t.sent, CLUSTER);
        publish_barriers();
        let_next_begin();
    }
    for (int k = 0; k < CHUNKS; k++) t.marks[tid + k * THREADS] = 0;
    __syncwarp();
    cluster_barrier();
    await_earlier();
    uint4 held[EACH][CHUNKS];
    u32 marks[CHUNKS] = {};
#pragma unroll
    for (int e = 0; e < EACH; e++)
#pragma unroll
        for (int k = 0; k < CHUNKS; k++) {
            int chunk = tid + k * THREADS;
            held[e][k] = make_uint4(0, 0, 0, 0);
            if (chunk < chunks && first + e < p.rows) held[e][k] = fresh16(p.x + (long long)(first + e) * p.columns + chunk * 8);
        }
#pragma unroll
    for (int e = 0; e < EACH; e++)
#pragma unroll
        for (int k = 0; k < CHUNKS; k++) marks[k] |= reached(held[e][k], p.threshold);
    join_marks(t, marks);
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        u32 most = 0;
#pragma unroll
        for (int k = 0; k < CHUNKS; k++) clear(held[e][k], marks[k]), most = larger_sizes(most, held[e][k]);
        most = warp_max(larger_of(most));
        if (lane == 0) t.largest[e][warp] = most;
    }
    __syncthreads();
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        u32 most = 0;
        int row = first + e;
        for (int i = 0; i < WARPS; i++) most = max(most, t.largest[e][i]);
        float absmax = widen(most);
        if (row < p.rows && tid == 0) p.scale[row] = divided(absmax, LARGEST);
        int sum = warp_sum(write_codes(p.codes + (long long)row * p.columns, held[e], factor_of(absmax, LARGEST), row < p.rows ? chunks : 0));
        if (lane == 0) t.sums[e][warp] = sum;
    }
    __syncthreads();
    if (tid < EACH && first + tid < p.rows) {
        int sum = 0;
        for (int i = 0; i < WARPS; i++) sum += t.sums[tid][i];
        p.offset[first + tid] = 128 * sum;
    }
    if (cluster_rank() == 0) list_columns(p, marks, t.turns);
}
#else
extern "C" __global__ void __launch_bounds__(THREADS) int8_quantize(const Params p) {
    extern __shared__ uint4 shared[];
    u32 *turns = (u32 *)shared, *largest = turns + WARPS;
    int *sums = (int *)(largest + WARPS);
    int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, chunks = p.columns / 8, near = min(lane, WARPS - 1);
    int blocks = gridDim.x - (p.marks ? 1 : 0);  // the last only lists, for which no row waits then
    if (tid == 0) let_next_begin();
    await_earlier();
    u32 marks[CHUNKS] = {};
#if OUTLIERS
    if (p.marks) {
#pragma unroll
        for (int k = 0; k < CHUNKS; k++)
            if (tid + k * THREADS < chunks) marks[k] = fresh(p.marks + tid + k * THREADS);
        if (blockIdx.x == blocks) return list_columns(p, marks, turns);
    }
#endif
    for (int row = p.rows - 1 - blockIdx.x; row >= 0; row -= blocks) {  // what was marked last is still near
        const u16 *from = p.x + (long long)row * p.columns;
        uint4 held[CHUNKS];
        u32 most = 0;
#pragma unroll
        for (int k = 0; k < CHUNKS; k++) {
            held[k] = make_uint4(0, 0, 0, 0);
            if (tid + k * THREADS < chunks) held[k] = OUTLIERS ? fresh16(from + (tid + k * THREADS) * 8) : last16(from + (tid + k * THREADS) * 8);
        }
#if OUTLIERS
        if (!p.marks) {
#pragma unroll
            for (int k = 0; k < CHUNKS; k++) marks[k] = reached(held[k], p.threshold);
            list_columns(p, marks, turns);
        }
#endif
#pragma unroll
        for (int k = 0; k < CHUNKS; k++) {
            if (OUTLIERS) clear(held[k], marks[k]);
            most = larger_sizes(most, held[k]);
        }
        most = warp_max(larger_of(most));
        if (lane == 0) largest[warp] = most;
        __syncthreads();
        float absmax = widen(warp_max(largest[near]));
        if (tid == 0) p.scale[row] = divided(absmax, LARGEST);
        int sum = warp_sum(write_codes(p.codes + (long long)row * p.columns, held, factor_of(absmax, LARGEST), chunks));
        if (lane == 0) sums[warp] = sum;
        __syncthreads();
        if (FLOAT8 || warp) continue;
        sum = warp_sum(lane < WARPS ? sums[lane] : 0);
        if (lane == 0) p.offset[row] = 128 * sum;
        __syncwarp();
    }
}
#endif
