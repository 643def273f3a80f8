// Rows become codes in the kernel that multiplies them, beside the products (AHEAD): for int8_product.cu.
//
// Whichever warp is free takes the next row, so nothing depends on which blocks run at a time. All warps take one before
// they do what they are for, the helpers go on until there are none; who needs 64 WG rows waits until all are counted.
// The numbers to begin with are zeros: [0] the next row, [1] blocks that are done, then how many rows of each tile are, then
// a bit for each outlier column. The last block leaves zeros.

DEVICE u32 *counts_of(const Params &p) { return p.ahead + 2; }
DEVICE const u8 *marks_of(const Params &p) { return (const u8 *)(counts_of(p) + (p.rows + BM - 1) / BM); }

#ifndef EMULATED
DEVICE u32 counted(const u32 *count) {
    u32 v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(count) : "memory");
    return v;
}
DEVICE void count_row(u32 *count) { asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory"); }
// What was written plainly is to be read by the engine that copies tiles, or was, by another multiprocessor.
DEVICE void between_engines() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
DEVICE void pause() { asm volatile("nanosleep.u32 32;" ::: "memory"); }
#endif

DEVICE void await_rows(const Params &p, int row) {
    if (row >= p.rows) return;
    u32 all = min(p.rows - row, BM);
    while (counted(counts_of(p) + row / BM) < all) pause();
    between_engines();
}

DEVICE uint4 load_eight(const Params &p, const u16 *from, int chunk) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (chunk >= p.columns / 8) return v;
    v = fresh16(from + chunk * 8);
    if (OUTLIERS) clear(v, fresh(marks_of(p) + chunk));
    return v;
}

// One row by a warp; it is read twice, the second time out of the second cache.
DEVICE void make_row(const Params &p, int row, int lane) {
    constexpr int AT_ONCE = 6;
    const u16 *from = p.floats + (long long)row * p.columns;
    signed char *to = p.made + (long long)row * p.columns;
    int chunks = p.columns / 8, sum = 0;
    u32 most = 0;
#pragma unroll 1
    for (int first = lane; first < chunks; first += 32 * AT_ONCE) {
        uint4 held[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) held[k] = load_eight(p, from, first + 32 * k);
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) most = larger_sizes(most, held[k]);
    }
    float absmax = widen(warp_max(larger_of(most))), factor = factor_of(absmax);
#pragma unroll 1
    for (int first = lane; first < chunks; first += 32 * AT_ONCE) {
        uint4 held[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) held[k] = load_eight(p, from, first + 32 * k);
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            uint2 words = codes_of(held[k], factor);
            if (first + 32 * k >= chunks) continue;
            sum = byte_sum(words.x, byte_sum(words.y, sum));
            *(uint2 *)(to + (first + 32 * k) * 8) = words;
        }
    }
    sum = warp_sum(sum);
    if (lane == 0) ((float *)p.scale)[row] = divided(absmax, 127), ((int *)p.offset)[row] = 128 * sum;
    between_engines();
    __syncwarp();
    if (lane == 0) count_row(counts_of(p) + row / BM);
}

DEVICE int take_row(const Params &p, int lane) {
    u32 row = 0;
    if (lane == 0) row = atomicAdd(p.ahead, 1u);
    return from_lane_number((int)row, 0);
}

DEVICE void make_one(const Params &p, int lane) {
    int row = take_row(p, lane);
    if (row < p.rows) make_row(p, row, lane);
}

DEVICE void make_all(const Params &p, int lane) {
    for (int row = take_row(p, lane); row < p.rows;) {
        int next = take_row(p, lane);
        make_row(p, row, lane);
        row = next;
    }
}

// The list of outlier columns, by a warp; every block writes the same one.
DEVICE void list_columns(const Params &p, int lane) {
    int at = 0, chunks = p.columns / 8, *list = (int *)p.listed;
    for (int first = 0; first < chunks; first += 32) {
        u32 marks = first + lane < chunks ? fresh(marks_of(p) + first + lane) : 0;
        int count = count_bits(marks), here = at + warp_prefix(count) - count;
        for (; marks; marks &= marks - 1) list[++here] = (first + lane) * 8 + count_bits((marks & (0 - marks)) - 1);
        at += warp_sum(count);
    }
    if (lane == 0) list[0] = at;
}

// By the first warp, when all of the block is done.
DEVICE void leave_zeros(const Params &p, int lane) {
    int words = 2 + (p.rows + BM - 1) / BM + (OUTLIERS ? (p.columns + 31) / 32 : 0), others = 0;
    if (lane == 0) others = (int)atomicAdd(p.ahead + 1, 1u);
    if (from_lane_number(others, 0) != (int)gridDim.x - 1) return;
    for (int i = lane; i < words; i += 32) p.ahead[i] = 0;
}
