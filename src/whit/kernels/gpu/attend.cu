// One new token per sequence attends to a static cache: q and k are rotated, k and v put into the cache, and the heads
// that share keys read them once. Built after common.cuh. Macros:
//   D, GROUP           columns of a head; heads of q per head of k
//   CHUNK              places of the cache per block
//
// A block has one head of k of one sequence and CHUNK places; blocks beyond the last token do nothing. Scores and sums
// are float32. The last block of a head to finish joins the parts, always in the same order. q and k are rotated as
// transformers does it: both products rounded, then their sum.

struct Params {
    const u16 *q, *k, *v;      // (batch, heads D), (batch, key heads D) twice
    const u16 *cosine, *sine;  // (batch, D)
    u16 *keys, *values;        // (batch, key heads, length, D)
    const u8 *mask;            // (batch, length): places that may be seen
    const long long *slot;     // of the new token
    u16 *y;                    // (batch, heads D)
    float *partial;            // (batch, key heads, chunks, GROUP, D + 2)
    u32 *arrived;              // (batch, key heads), zeros; left at zero
    int length;
    float scale;               // times log2(e)
};

constexpr int THREADS = 128;
constexpr int WARPS = 4;
constexpr int LANES = D / 8;               // that share a key
constexpr int TEAMS = THREADS / LANES;     // keys at a time
constexpr int ROUNDS = CHUNK / TEAMS;
constexpr int PART = D + 2;                // floats of a head's part: sums, largest score, sum of weights
constexpr float LOWEST = -1e30f;

DEVICE float rounded(float v) { return widen(round_pair(v, v) & 0xFFFF); }
DEVICE float rotated(const u16 *x, const u16 *cosine, const u16 *sine, int i) {
    float other = i < D / 2 ? -widen(x[i + D / 2]) : widen(x[i - D / 2]);
    return rounded(rounded(widen(x[i]) * widen(cosine[i])) + rounded(other * widen(sine[i])));
}
DEVICE void unpack(float (&to)[8], uint4 v) {
    to[0] = widen(v.x & 0xFFFF), to[1] = widen(v.x >> 16), to[2] = widen(v.y & 0xFFFF), to[3] = widen(v.y >> 16);
    to[4] = widen(v.z & 0xFFFF), to[5] = widen(v.z >> 16), to[6] = widen(v.w & 0xFFFF), to[7] = widen(v.w >> 16);
}

struct Shared {
    float q[GROUP][D];
    float weights[GROUP][CHUNK];
    float sums[WARPS][GROUP][D];
    float largest[GROUP], total[GROUP];
    u32 ticket;
};

// Scores of the block's places, in powers of two; places that are not seen have LOWEST.
DEVICE void score(Shared &s, const Params &p, const uint4 *keys, const u8 *mask, int count) {
    int team = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    float q[GROUP][8];
#pragma unroll
    for (int g = 0; g < GROUP; g++)
#pragma unroll
        for (int i = 0; i < 8; i++) q[g][i] = s.q[g][lane * 8 + i];
#pragma unroll 4
    for (int round = 0; round < ROUNDS; round++) {
        int place = round * TEAMS + team;
        bool seen = place < count && mask[place];
        float key[8] = {}, dot[GROUP];
        if (seen) unpack(key, keys[place * LANES + lane]);
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            dot[g] = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) dot[g] += q[g][i] * key[i];
#pragma unroll
            for (int flip = LANES / 2; flip; flip /= 2) dot[g] += from_lane(dot[g], flip);
            if (lane == 0) s.weights[g][place] = seen ? dot[g] * p.scale : LOWEST;
        }
    }
}

// Scores become weights; each warp has its own heads.
DEVICE void weigh(Shared &s) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int g = warp; g < GROUP; g += WARPS) {
        float largest = LOWEST, total = 0;
#pragma unroll
        for (int i = lane; i < CHUNK; i += 32) largest = s.weights[g][i] > largest ? s.weights[g][i] : largest;
#pragma unroll
        for (int flip = 16; flip; flip /= 2) {
            float other = from_lane(largest, flip);
            largest = other > largest ? other : largest;
        }
#pragma unroll
        for (int i = lane; i < CHUNK; i += 32) {
            float w = s.weights[g][i] > LOWEST ? power_of_two(s.weights[g][i] - largest) : 0.0f;
            s.weights[g][i] = w, total += w;
        }
#pragma unroll
        for (int flip = 16; flip; flip /= 2) total += from_lane(total, flip);
        if (lane == 0) s.largest[g] = largest, s.total[g] = total;
    }
}

// Weighted sums of the values, per warp.
DEVICE void add_values(Shared &s, const uint4 *values, int count) {
    int team = threadIdx.x / LANES, lane = threadIdx.x % LANES, warp = threadIdx.x / 32;
    float sums[GROUP][8] = {};
#pragma unroll 4
    for (int round = 0; round < ROUNDS; round++) {
        int place = round * TEAMS + team;
        float value[8] = {};
        if (place < count) unpack(value, values[place * LANES + lane]);
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            float w = s.weights[g][place];
#pragma unroll
            for (int i = 0; i < 8; i++) sums[g][i] += w * value[i];
        }
    }
#pragma unroll
    for (int g = 0; g < GROUP; g++)
#pragma unroll
        for (int i = 0; i < 8; i++) {
#pragma unroll
            for (int flip = LANES; flip < 32; flip *= 2) sums[g][i] += from_lane(sums[g][i], flip);
            if (threadIdx.x % 32 < LANES) s.sums[warp][g][lane * 8 + i] = sums[g][i];
        }
}

DEVICE float summed(const Shared &s, int g, int i) {
    return (s.sums[0][g][i] + s.sums[1][g][i]) + (s.sums[2][g][i] + s.sums[3][g][i]);
}

extern "C" __global__ void __launch_bounds__(THREADS) attend(const Params p) {
    extern __shared__ uint4 shared[];
    next_may_begin(), previous_done();
    Shared &s = *(Shared *)shared;
    int slot = (int)*p.slot, chunks = slot / CHUNK + 1, chunk = blockIdx.x, tid = threadIdx.x;
    if (chunk >= chunks) return;
    int head = blockIdx.y, heads = gridDim.y, batch = blockIdx.z, first = chunk * CHUNK;
    long long which = (long long)batch * heads + head;
    const u16 *cosine = p.cosine + batch * D, *sine = p.sine + batch * D;
    u16 *keys = p.keys + which * p.length * D, *values = p.values + which * p.length * D;

    for (int i = tid; i < GROUP * D; i += THREADS) s.q[i / D][i % D] = rotated(p.q + (which * GROUP + i / D) * D, cosine, sine, i % D);
    if (chunk == chunks - 1)
        for (int i = tid; i < D; i += THREADS) {
            float k = rotated(p.k + which * D, cosine, sine, i);
            keys[(long long)slot * D + i] = (u16)round_pair(k, k);
            values[(long long)slot * D + i] = p.v[which * D + i];
        }
    __syncthreads();
    int count = min(CHUNK, slot + 1 - first);
    score(s, p, (const uint4 *)(keys + (long long)first * D), p.mask + (long long)batch * p.length + first, count);
    __syncthreads();
    weigh(s);
    __syncthreads();
    add_values(s, (const uint4 *)(values + (long long)first * D), count);
    __syncthreads();

    u16 *y = p.y + which * GROUP * D;
    float *parts = p.partial + which * gridDim.x * GROUP * PART;
    for (int i = tid; i < GROUP * D; i += THREADS) {
        int g = i / D;
        float sum = summed(s, g, i % D);
        if (chunks == 1) {
            sum = s.total[g] > 0 ? sum / s.total[g] : 0.0f;
            y[i] = (u16)round_pair(sum, sum);
        } else {
            float *part = parts + (chunk * GROUP + g) * PART;
            part[i % D] = sum;
            if (i % D == 0) part[D] = s.largest[g], part[D + 1] = s.total[g];
        }
    }
    if (chunks == 1) return;
    __threadfence();
    __syncthreads();
    if (tid == 0) s.ticket = atomicAdd(p.arrived + which, 1u);
    __syncthreads();
    if (s.ticket != (u32)chunks - 1) return;
    __threadfence();
    for (int i = tid; i < GROUP * D; i += THREADS) {
        float largest = LOWEST, sum = 0, total = 0;
        const float *part = parts + i / D * PART;
#pragma unroll 4
        for (int c = 0; c < chunks; c++) {
            float m = load_uncached(part + c * GROUP * PART + D);
            largest = m > largest ? m : largest;
        }
#pragma unroll 4
        for (int c = 0; c < chunks; c++) {
            const float *at = part + c * GROUP * PART;
            float factor = power_of_two(load_uncached(at + D) - largest);
            sum += factor * load_uncached(at + i % D), total += factor * load_uncached(at + D + 1);
        }
        sum = total > 0 ? sum / total : 0.0f;
        y[i] = (u16)round_pair(sum, sum);
    }
    if (tid == 0) p.arrived[which] = 0;
}
