// One new token per sequence attends to a static cache: q and k are rotated, k and v put into the cache, and the heads
// that share keys read them once. Built after common.cuh. Macros:
//   D, GROUP           columns of a head; heads of q per head of k
//   CHUNK              places of the cache per block
//   SOON               chunks that are read before it is known how far the tokens reach: none where memory is the limit
//
// A block has one head of k of one sequence and CHUNK places; blocks beyond the last token do nothing. All that it reads
// of the cache is under way before anything is computed, and before the product in front of it has ended: no kernel that
// begins early writes `slot`, `position`, `mask` or older places. All of it comes from far away, for a step reads the whole model: so
// nothing waits for another address, but for chunks that are not read SOON. Scores and sums are float32. The last block of
// a head to finish joins the parts, always in the same order. q and k are rotated as transformers does it: both products
// rounded, then their sum.

struct Params {
    const u16 *q, *k, *v;      // (batch, heads D), (batch, key heads D) twice
    const u16 *cosine, *sine;  // (positions, D)
    const long long *position; // (batch), of the new tokens
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
    uint4 key[LANES], value[LANES];  // of the new token
    float weights[GROUP][CHUNK];
    float sums[WARPS][GROUP][D];
    float largest[GROUP], total[GROUP];
    u32 ticket, padding[3];
};
struct Held {  // what a thread reads of the cache: eight columns of every TEAMS-th place
    uint4 keys[ROUNDS], values[ROUNDS];
    u32 seen;  // bit per round
};

DEVICE void load_held(Held &held, const uint4 *keys, const uint4 *values, const u8 *mask, int count) {
    int team = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    held.seen = 0;
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        int place = round * TEAMS + team;
        held.keys[round] = held.values[round] = make_uint4(0, 0, 0, 0);
        if (place >= count) continue;
        held.keys[round] = keys[place * LANES + lane], held.values[round] = values[place * LANES + lane];
        held.seen |= (u32)(mask[place] != 0) << round;
    }
}
// Nothing of places that are not seen, and not yet of the new token.
DEVICE void forget(Held &held, int fresh) {
    int team = threadIdx.x / LANES;
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        int place = round * TEAMS + team;
        if (place > fresh) held.seen &= ~(1u << round);
        if (place >= fresh || !(held.seen >> round & 1)) held.keys[round] = held.values[round] = make_uint4(0, 0, 0, 0);
    }
}

// q, rotated; in the last chunk the new key, rotated, and value too, also in the cache at `keys` and `values`.
DEVICE void stage(Shared &s, const Params &p, long long which, long long position, bool last, u16 *keys, u16 *values) {
    const u16 *cosine = p.cosine + position * D, *sine = p.sine + position * D;
    for (int i = threadIdx.x; i < GROUP * D; i += THREADS)
        s.q[i / D][i % D] = rotated(p.q + (which * GROUP + i / D) * D, cosine, sine, i % D);
    if (!last) return;
    for (int i = threadIdx.x; i < D; i += THREADS) {
        float k = rotated(p.k + which * D, cosine, sine, i);
        ((u16 *)s.key)[i] = keys[i] = (u16)round_pair(k, k);
        ((u16 *)s.value)[i] = values[i] = p.v[which * D + i];
    }
}

// Scores of the block's places, in powers of two; places that are not seen have LOWEST.
DEVICE void score(Shared &s, const Held &held, float scale) {
    int team = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    float q[GROUP][8];
#pragma unroll
    for (int g = 0; g < GROUP; g++)
#pragma unroll
        for (int i = 0; i < 8; i++) q[g][i] = s.q[g][lane * 8 + i];
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        float key[8], dot[GROUP];
        unpack(key, held.keys[round]);
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            dot[g] = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) dot[g] += q[g][i] * key[i];
#pragma unroll
            for (int flip = LANES / 2; flip; flip /= 2) dot[g] += from_lane(dot[g], flip);
            if (lane == 0) s.weights[g][round * TEAMS + team] = held.seen >> round & 1 ? dot[g] * scale : LOWEST;
        }
    }
}

// Scores become weights relative to the largest; each warp has its own heads.
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
DEVICE void add_values(Shared &s, const Held &held) {
    int team = threadIdx.x / LANES, lane = threadIdx.x % LANES, warp = threadIdx.x / 32;
    float sums[GROUP][8] = {};
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        float value[8];
        unpack(value, held.values[round]);
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            float w = s.weights[g][round * TEAMS + team];
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

// The parts of a head's chunks become y; `factors`: room for GROUP x chunks.
DEVICE void join(Shared &s, float *factors, const float *parts, u16 *y, int chunks) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int g = warp; g < GROUP; g += WARPS) {
        float largest = LOWEST, total = 0;
#pragma unroll 2
        for (int c = lane; c < chunks; c += 32) {
            float m = factors[g * chunks + c] = load_uncached(parts + (c * GROUP + g) * PART + D);
            largest = m > largest ? m : largest;
        }
#pragma unroll
        for (int flip = 16; flip; flip /= 2) {
            float other = from_lane(largest, flip);
            largest = other > largest ? other : largest;
        }
#pragma unroll 2
        for (int c = lane; c < chunks; c += 32) {
            float factor = factors[g * chunks + c] = power_of_two(factors[g * chunks + c] - largest);
            total += factor * load_uncached(parts + (c * GROUP + g) * PART + D + 1);
        }
#pragma unroll
        for (int flip = 16; flip; flip /= 2) total += from_lane(total, flip);
        if (lane == 0) s.total[g] = total;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < GROUP * D; i += THREADS) {
        int g = i / D;
        float sum = 0;
#pragma unroll 8
        for (int c = 0; c < chunks; c++) sum += factors[g * chunks + c] * load_uncached(parts + (c * GROUP + g) * PART + i % D);
        sum = s.total[g] > 0 ? sum / s.total[g] : 0.0f;
        y[i] = (u16)round_pair(sum, sum);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) attend(const Params p) {
    extern __shared__ uint4 shared[];
    next_may_begin();
    Shared &s = *(Shared *)shared;
    int chunk = blockIdx.x, tid = threadIdx.x, head = blockIdx.y, heads = gridDim.y, batch = blockIdx.z, first = chunk * CHUNK;
    long long which = (long long)batch * heads + head;
    u16 *keys = p.keys + (which * p.length + first) * D, *values = p.values + (which * p.length + first) * D;

    Held held;
    const u8 *mask = p.mask + (long long)batch * p.length + first;
    if (chunk < SOON) load_held(held, (const uint4 *)keys, (const uint4 *)values, mask, min(CHUNK, p.length - first));
    int slot = (int)*p.slot, chunks = slot / CHUNK + 1, fresh = slot - first;
    if (chunk >= chunks) return;
    if (chunk >= SOON) load_held(held, (const uint4 *)keys, (const uint4 *)values, mask, min(CHUNK, fresh + 1));
    if (tid == 0) prefetch(p.arrived + which);
    long long position = p.position[batch];
    if (tid < D / 32) prefetch(p.cosine + position * D + tid * 32), prefetch(p.sine + position * D + tid * 32);
    previous_done();
    forget(held, fresh);
    stage(s, p, which, position, chunk == chunks - 1, keys + (long long)fresh * D, values + (long long)fresh * D);
    __syncthreads();
    if (chunk == chunks - 1)
#pragma unroll
        for (int round = 0; round < ROUNDS; round++)
            if (round * TEAMS + tid / LANES == fresh) held.keys[round] = s.key[tid % LANES], held.values[round] = s.value[tid % LANES];
    score(s, held, p.scale);
    __syncthreads();
    weigh(s);
    __syncthreads();
    add_values(s, held);
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
    join(s, (float *)(&s + 1), parts, y, chunks);
    if (tid == 0) p.arrived[which] = 0;
}
