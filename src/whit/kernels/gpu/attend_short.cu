// One new token per sequence attends to a static cache that a cluster's registers hold: as attend.cu, and faster, on
// Hopper. Built after common.cuh. Macros:
//   D, GROUP           columns of a head; heads of q per head of k
//   CLUSTER            blocks that share the places of one head of k of one sequence
//   ROUNDS             places of a lane
//
// D / 8 lanes hold a place. All places are on their way before the product in front of this has ended (attend.cu says
// why they may be), the first SOON before it is known how far the tokens reach. After it nothing is read but q, k and v,
// once, by all lanes at the same time; q and k are rotated in registers. The warps of a block meet once.
// Blocks send each other sums, and each finishes its share of the columns; always in the same order.
#include "int8_cluster.cuh"

struct Params {
    const u16 *q, *k, *v;      // (batch, heads D), (batch, key heads D) twice
    const u16 *cosine, *sine;  // (positions, D)
    const long long *position; // (batch), of the new tokens
    u16 *keys, *values;        // (batch, key heads, length, D)
    const u8 *mask;            // (batch, length): places that may be seen
    const long long *slot;     // of the new token
    u16 *y;                    // (batch, heads D)
    int length, heads;         // key heads
    float scale;               // times log2(e)
};

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int LANES = D / 8, TEAMS = 32 / LANES;  // lanes that share a place; places of a warp at a time
constexpr int APART = WARPS * TEAMS * CLUSTER;    // a lane's places
constexpr int OUTS = GROUP * D, SHARE = OUTS / CLUSTER;
constexpr int SOON = 2;
constexpr float LOWEST = -1e30f;
static_assert(SHARE % 4 == 0 && THREADS >= GROUP * CLUSTER, "sums are sent by fours");

struct Shared {
    float4 sums[WARPS][OUTS / 4];
    float4 inbox[CLUSTER][SHARE / 4];
    float largest[WARPS][GROUP], total[WARPS][GROUP];
    u32 sent[CLUSTER][GROUP][2];  // largest score and total of weights, as bits
    u64 full;
};

DEVICE float rounded(float v) { return widen(round_pair(v, v) & 0xFFFF); }
DEVICE void unpack(float (&to)[8], const uint4 &v) {
    to[0] = widen(v.x & 0xFFFF), to[1] = widen(v.x >> 16), to[2] = widen(v.y & 0xFFFF), to[3] = widen(v.y >> 16);
    to[4] = widen(v.z & 0xFFFF), to[5] = widen(v.z >> 16), to[6] = widen(v.w & 0xFFFF), to[7] = widen(v.w >> 16);
}
DEVICE uint4 packed(const float (&v)[8]) {
    return make_uint4(round_pair(v[0], v[1]), round_pair(v[2], v[3]), round_pair(v[4], v[5]), round_pair(v[6], v[7]));
}
// Eight columns of a head, rotated as transformers does it: both products rounded, then their sum.
DEVICE void rotate(float (&to)[8], const uint4 &from, const float (&cosine)[8], const float (&sine)[8], bool upper) {
    uint4 far = {};
    far.x = float_bits(from_lane(bits_float(from.x), LANES / 2)), far.y = float_bits(from_lane(bits_float(from.y), LANES / 2));
    far.z = float_bits(from_lane(bits_float(from.z), LANES / 2)), far.w = float_bits(from_lane(bits_float(from.w), LANES / 2));
    float near[8], other[8];
    unpack(near, from), unpack(other, far);
#pragma unroll
    for (int i = 0; i < 8; i++)
        to[i] = rounded(rounded(near[i] * cosine[i]) + rounded((upper ? other[i] : -other[i]) * sine[i]));
}
template <int FROM> DEVICE float largest_of(float v) {  // over lanes FROM, 2 FROM, ... 16 apart
#pragma unroll
    for (int flip = FROM; flip < 32; flip *= 2) {
        float other = from_lane(v, flip);
        v = other > v ? other : v;
    }
    return v;
}
template <int FROM, int END> DEVICE float sum_of(float v) {
#pragma unroll
    for (int flip = FROM; flip < END; flip *= 2) v += from_lane(v, flip);
    return v;
}

struct Held {  // a lane's eight columns of its places
    uint4 keys[ROUNDS], values[ROUNDS];
    u32 seen;  // bit per round
};
DEVICE void load_held(Held &held, const Params &p, int batch, long long which, int first, int lane, int slot) {
    held.seen = 0;
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        int place = first + round * APART;
        held.keys[round] = held.values[round] = make_uint4(0, 0, 0, 0);
        if (place >= p.length || (round >= SOON && place > slot)) continue;
        long long at = (which * p.length + place) * LANES + lane;
        held.keys[round] = ((const uint4 *)p.keys)[at], held.values[round] = ((const uint4 *)p.values)[at];
        held.seen |= (u32)(p.mask[(long long)batch * p.length + place] != 0) << round;
    }
}

// The new key and value, in the cache and in the registers of its place; nothing of places that are not seen.
DEVICE void put_new(Held &held, const Params &p, long long at_first, int first, int slot, const uint4 &k, const uint4 &v) {
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        int place = first + round * APART;
        if (place == slot) {
            long long at = at_first + round * (APART * LANES);
            ((uint4 *)p.keys)[at] = held.keys[round] = k, ((uint4 *)p.values)[at] = held.values[round] = v;
        }
        if (place > slot) held.seen &= ~(1u << round);
        if (!(held.seen >> round & 1)) held.values[round] = make_uint4(0, 0, 0, 0);
    }
}

// A warp's part of the attention of one head of q: weights relative to its largest score, and their sums.
DEVICE void attend_head(Shared &s, const Held &held, const float (&q)[8], int g, float scale) {
    int lane = threadIdx.x % LANES, warp = threadIdx.x / 32;
    float scores[ROUNDS], largest = LOWEST, total = 0, sums[8] = {};
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        float key[8], dot = 0;
        unpack(key, held.keys[round]);
#pragma unroll
        for (int i = 0; i < 8; i++) dot += q[i] * key[i];
        dot = sum_of<1, LANES>(dot);
        scores[round] = held.seen >> round & 1 ? dot * scale : LOWEST;
        largest = scores[round] > largest ? scores[round] : largest;
    }
    largest = largest_of<LANES>(largest);
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        float value[8], weight = held.seen >> round & 1 ? power_of_two(scores[round] - largest) : 0.0f;
        unpack(value, held.values[round]);
        total += weight;
#pragma unroll
        for (int i = 0; i < 8; i++) sums[i] += weight * value[i];
    }
    total = sum_of<LANES, 32>(total);
#pragma unroll
    for (int i = 0; i < 8; i++) sums[i] = sum_of<LANES, 32>(sums[i]);
    if (threadIdx.x % 32 < LANES) {
        float4 *to = s.sums[warp] + g * (D / 4) + 2 * lane;
        to[0] = {sums[0], sums[1], sums[2], sums[3]}, to[1] = {sums[4], sums[5], sums[6], sums[7]};
    }
    if (threadIdx.x % 32 == 0) s.largest[warp][g] = largest, s.total[warp][g] = total;
}

DEVICE void add(float4 &sum, float factor, const float4 &v) {
    sum.x += factor * v.x, sum.y += factor * v.y, sum.z += factor * v.z, sum.w += factor * v.w;
}
DEVICE float largest_in_block(const Shared &s, int g) {
    float largest = s.largest[0][g];
#pragma unroll
    for (int w = 1; w < WARPS; w++) largest = s.largest[w][g] > largest ? s.largest[w][g] : largest;
    return largest;
}
// The warps' sums become the block's, and go to the blocks that finish them.
DEVICE void send_sums(Shared &s, int rank) {
    for (int i = threadIdx.x; i < OUTS / 4; i += THREADS) {
        int g = i / (D / 4);
        float largest = largest_in_block(s, g);
        float4 sum = {};
#pragma unroll
        for (int w = 0; w < WARPS; w++) add(sum, power_of_two(s.largest[w][g] - largest), s.sums[w][i]);
        int4 bits = {(int)float_bits(sum.x), (int)float_bits(sum.y), (int)float_bits(sum.z), (int)float_bits(sum.w)};
        send((int4 *)(s.inbox[rank] + i % (SHARE / 4)), bits, i / (SHARE / 4), &s.full);
    }
    int tid = THREADS - 1 - threadIdx.x;  // the threads without sums
    if (tid < GROUP * CLUSTER) {
        int g = tid % GROUP, to = tid / GROUP;
        float largest = largest_in_block(s, g), total = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) total += power_of_two(s.largest[w][g] - largest) * s.total[w][g];
        send(&s.sent[rank][g][0], float_bits(largest), to, &s.full), send(&s.sent[rank][g][1], float_bits(total), to, &s.full);
    }
}
// A block's share of y from what all sent.
DEVICE void finish(const Shared &s, u16 *y, int rank) {
    for (int i = threadIdx.x; i < SHARE; i += THREADS) {
        int g = (rank * SHARE + i) / D;
        float largest = bits_float(s.sent[0][g][0]), total = 0, sum = 0;
#pragma unroll
        for (int r = 1; r < CLUSTER; r++) largest = bits_float(s.sent[r][g][0]) > largest ? bits_float(s.sent[r][g][0]) : largest;
#pragma unroll
        for (int r = 0; r < CLUSTER; r++) {
            float factor = power_of_two(bits_float(s.sent[r][g][0]) - largest);
            total += factor * bits_float(s.sent[r][g][1]), sum += factor * ((const float *)s.inbox[r])[i];
        }
        sum = total > 0 ? sum / total : 0.0f;
        y[rank * SHARE + i] = (u16)round_pair(sum, sum);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) attend_short(const Params p) {
    extern __shared__ uint4 shared[];
    next_may_begin();
    Shared &s = *(Shared *)shared;
    int rank = (int)cluster_rank(), lane = threadIdx.x % LANES, first = rank * (WARPS * TEAMS) + threadIdx.x / LANES;
    long long which = blockIdx.x / CLUSTER;
    int batch = (int)which / p.heads;
    if (threadIdx.x == 0) {
        make_barrier(&s.full, 1), publish_barriers();
        expect(&s.full, CLUSTER * (SHARE * 4 + GROUP * 8));
    }
    cluster_arrive();
    Held held;
    int slot = (int)*p.slot;
    long long angles = p.position[batch] * LANES + lane;
    load_held(held, p, batch, which, first, lane, slot);
    uint4 cosines = ((const uint4 *)p.cosine)[angles], sines = ((const uint4 *)p.sine)[angles];
    previous_done();
    uint4 raw[GROUP], k = ((const uint4 *)p.k)[which * LANES + lane], v = ((const uint4 *)p.v)[which * LANES + lane];
    float cosine[8], sine[8], q[GROUP][8], new_key[8];
#pragma unroll
    for (int g = 0; g < GROUP; g++) raw[g] = ((const uint4 *)p.q)[(which * GROUP + g) * LANES + lane];
    unpack(cosine, cosines), unpack(sine, sines);
#pragma unroll
    for (int g = 0; g < GROUP; g++) rotate(q[g], raw[g], cosine, sine, lane >= LANES / 2);
    rotate(new_key, k, cosine, sine, lane >= LANES / 2);
    put_new(held, p, (which * p.length + first) * LANES + lane, first, slot, packed(new_key), v);
#pragma unroll
    for (int g = 0; g < GROUP; g++) attend_head(s, held, q[g], g, p.scale);
    __syncthreads();
    cluster_wait();
    send_sums(s, rank);
    await_sent(&s.full, 0);
    finish(s, p.y + which * OUTS, rank);
}
