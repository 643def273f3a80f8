// What the kernels of int8 activations share: sums and maxima over a warp, and work that begins before its turn.
//
// A kernel that was launched early (int8.py) may run while the one before it in the stream still does. Until
// `await_earlier` it reads and writes nothing that another kernel makes; `let_next_begin` lets the one behind it in.

#ifndef EMULATED
DEVICE void await_earlier() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
// What an earlier kernel wrote is read where it is coherent: a kernel that began early may find old lines nearer.
[[maybe_unused]] DEVICE uint4 fresh16(const void *p) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}
// The same for what is read for the last time: other lines stay in the second cache for longer.
[[maybe_unused]] DEVICE uint4 last16(const void *p) {
    uint4 v;
    asm volatile("{.reg .b64 policy;\ncreatepolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
                 "ld.global.cg.L2::cache_hint.v4.u32 {%0,%1,%2,%3}, [%4], policy;}"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}
template <class T> DEVICE T fresh(const T *p) { return __ldcg(p); }
[[maybe_unused]] DEVICE u32 warp_max(u32 v) { return __reduce_max_sync(0xFFFFFFFFu, v); }
[[maybe_unused]] DEVICE int warp_sum(int v) { return __reduce_add_sync(0xFFFFFFFFu, v); }
[[maybe_unused]] DEVICE int warp_prefix(int v) {  // the sum of all lanes up to this one
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        int below = __shfl_up_sync(0xFFFFFFFFu, v, d);
        if (lane >= d) v += below;
    }
    return v;
}
[[maybe_unused]] DEVICE int from_lane_number(int v, int lane) { return __shfl_sync(0xFFFFFFFFu, v, lane); }
[[maybe_unused]] DEVICE u32 lanes_with(bool v) { return __ballot_sync(0xFFFFFFFFu, v); }
[[maybe_unused]] DEVICE u32 exchange(u32 v, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, v, mask); }
[[maybe_unused]] DEVICE float divided(float a, float b) { return __fdiv_rn(a, b); }
[[maybe_unused]] DEVICE float clamped(float v, float most) { return fminf(fmaxf(v, -most), most); }  // -most for a NaN
[[maybe_unused]] DEVICE int count_bits(u32 v) { return __popc(v); }
[[maybe_unused]] DEVICE u32 larger_pair(u32 a, u32 b) { return __vmaxu2(a, b); }
[[maybe_unused]] DEVICE int byte_sum(u32 bytes, int sum) { return __dp4a((int)bytes, 0x01010101, sum); }  // signed
[[maybe_unused]] DEVICE u32 float8_pair(float low, float high) {  // E4M3, at most 448
    u16 d;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(d) : "f"(high), "f"(low));
    return d;
}
#endif

constexpr int OUTLIERS_AT_ONCE = 16;  // columns that lie in shared memory together

// Eight numbers of 16 bits. |x| is compared as its bits, two at a time: so a NaN is the largest of all.
DEVICE u32 reached(u32 pair, float threshold) {
    return (u32)(fabsf(widen(pair & 0xFFFF)) >= threshold) | (u32)(fabsf(widen(pair >> 16)) >= threshold) << 1;
}
[[maybe_unused]] DEVICE u32 reached(const uint4 &v, float threshold) {  // a bit for each
    return reached(v.x, threshold) | reached(v.y, threshold) << 2 | reached(v.z, threshold) << 4 | reached(v.w, threshold) << 6;
}
DEVICE u32 halves_of(u32 marks) { return (marks & 1 ? 0xFFFFu : 0) | (marks & 2 ? 0xFFFF0000u : 0); }
[[maybe_unused]] DEVICE void clear(uint4 &v, u32 marks) {  // what is marked becomes 0
    if (!marks) return;
    v.x &= ~halves_of(marks), v.y &= ~halves_of(marks >> 2), v.z &= ~halves_of(marks >> 4), v.w &= ~halves_of(marks >> 6);
}
[[maybe_unused]] DEVICE u32 larger_sizes(u32 most, const uint4 &v) {  // of two columns each
    u32 a = larger_pair(v.x & 0x7FFF7FFF, v.y & 0x7FFF7FFF), b = larger_pair(v.z & 0x7FFF7FFF, v.w & 0x7FFF7FFF);
    return larger_pair(most, larger_pair(a, b));
}
[[maybe_unused]] DEVICE u32 larger_of(u32 pair) { return larger_pair(pair, pair >> 16) & 0xFFFF; }
[[maybe_unused]] DEVICE float factor_of(float absmax, float largest = 127) {
    return absmax > 0 ? multiplied(divided(1, absmax), largest) : 0;
}

// Codes of four numbers. 1.5 times 2^23 has steps of 1: the sum rounds as it should and ends in the code. Where the factor
// is no finite number (ODD), products are not either.
template <bool ODD> DEVICE u32 codes_of(u32 low, u32 high, float factor) {
    float v[4] = {widen(low & 0xFFFF), widen(low >> 16), widen(high & 0xFFFF), widen(high >> 16)};
    u32 bits[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float step = multiplied(v[i], factor);
        if (ODD) step = v[i] == 0 ? 0 : clamped(step, 127);
        bits[i] = float_bits(step + 12582912.0f);
    }
    return permute(permute(bits[0], bits[1], 0x0040), permute(bits[2], bits[3], 0x0040), 0x5410);
}
[[maybe_unused]] DEVICE uint2 codes_of(const uint4 &v, float factor) {
    if (factor > 3e38f) return make_uint2(codes_of<true>(v.x, v.y, factor), codes_of<true>(v.z, v.w, factor));
    return make_uint2(codes_of<false>(v.x, v.y, factor), codes_of<false>(v.z, v.w, factor));
}

// The same as E4M3 floats.
DEVICE u32 float8_of(u32 pair, float factor) {
    return float8_pair(multiplied(widen(pair & 0xFFFF), factor), multiplied(widen(pair >> 16), factor));
}
[[maybe_unused]] DEVICE uint2 float8_of(const uint4 &v, float factor) {
    return make_uint2(float8_of(v.x, factor) | float8_of(v.y, factor) << 16, float8_of(v.z, factor) | float8_of(v.w, factor) << 16);
}
