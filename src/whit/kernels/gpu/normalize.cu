// One block per row of x: residual += added, rounded; y = weight * round(residual / root of its mean square), rounded.
// The roundings are those of the modules' own code in transformers. Built after common.cuh. Macros:
//   COLUMNS, THREADS   of a row, a multiple of 8; of a block
//   ADDED              0: nothing is added

struct Params {
    u16 *residual;
    const u16 *added, *weight;
    u16 *y;
    float epsilon;
};

constexpr int UNITS = COLUMNS / 8;
constexpr int HELD = (UNITS + THREADS - 1) / THREADS;  // units of eight columns per thread
constexpr int WARPS = THREADS / 32;

DEVICE u32 part(const uint4 &v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
DEVICE u32 multiply_pair(u32 a, float factor) { return round_pair(widen(a & 0xFFFF) * factor, widen(a >> 16) * factor); }

extern "C" __global__ void __launch_bounds__(THREADS) normalize(const Params p) {
    extern __shared__ uint4 shared[];
    next_may_begin();
    uint4 weights[HELD];  // read before what they wait for is there
#pragma unroll
    for (int h = 0; h < HELD; h++) weights[h] = ((const uint4 *)p.weight)[min(h * THREADS + (int)threadIdx.x, UNITS - 1)];
    previous_done();
    float *sums = (float *)shared, sum = 0;
    long long row = (long long)blockIdx.x * UNITS;
    uint4 held[HELD];
#pragma unroll
    for (int h = 0; h < HELD; h++) {
        int unit = h * THREADS + threadIdx.x;
        if (unit >= UNITS) break;
        uint4 v = ((const uint4 *)p.residual)[row + unit];
#if ADDED
        uint4 a = ((const uint4 *)p.added)[row + unit];
        v = make_uint4(add_pair(v.x, a.x), add_pair(v.y, a.y), add_pair(v.z, a.z), add_pair(v.w, a.w));
        ((uint4 *)p.residual)[row + unit] = v;
#endif
        held[h] = v;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float low = widen(part(v, i) & 0xFFFF), high = widen(part(v, i) >> 16);
            sum += low * low + high * high;
        }
    }
#pragma unroll
    for (int flip = 16; flip; flip /= 2) sum += from_lane(sum, flip);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    float total = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) total += sums[i];
    float factor = inverse_root(total * (1.0f / COLUMNS) + p.epsilon);
#pragma unroll
    for (int h = 0; h < HELD; h++) {
        int unit = h * THREADS + threadIdx.x;
        if (unit >= UNITS) break;
        u32 out[4];
#pragma unroll
        for (int i = 0; i < 4; i++) out[i] = scale_by(multiply_pair(part(held[h], i), factor), part(weights[h], i));
        ((uint4 *)p.y)[row + unit] = make_uint4(out[0], out[1], out[2], out[3]);
    }
}
