// What the kernels share: instructions, and how a scale, a zero point and a code are read. The host defines
//   BITS, CODEBOOK     width of a code; 1: a table of levels instead of integers
//   HALF               activations and matrix operands: 0 bfloat16, 1 float16
//   OFFSET             integer that is subtracted from every code
//   SCALE              0 bfloat16, 1 float16, 2 float32, 3 float32 that is itself quantized (NF4's double quantization)
//   ZERO               0 none, 1 integers packed like codes, 2 float16, 3 one half for all

#ifndef EMULATED
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
#define DEVICE static __device__ __forceinline__

DEVICE float bits_float(u32 v) { return __uint_as_float(v); }
[[maybe_unused]] DEVICE u32 float_bits(float v) { return __float_as_uint(v); }
DEVICE u32 permute(u32 a, u32 b, u32 s) { return __byte_perm(a, b, s); }

DEVICE uint4 load16(const void *p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
DEVICE uint2 load8(const void *p) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}
DEVICE u32 load4(const void *p) {
    u32 v;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}
[[maybe_unused]] DEVICE void copy_behind(void *to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
template <int BYTES> DEVICE void copy_small(void *to, const void *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from), "n"(BYTES) : "memory");
}
[[maybe_unused]] DEVICE void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEVICE void copies_left() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
[[maybe_unused]] DEVICE void prefetch(const void *p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }  // to the second cache
DEVICE float load_uncached(const float *p) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
    return v;
}

// A kernel that is launched `early` (nvrtc.py) may begin while the one before it ends. Until `previous_done` it may
// only read what no kernel writes: weights. `next_may_begin` says the same to the one behind it.
#if __CUDA_ARCH__ >= 900
[[maybe_unused]] DEVICE void previous_done() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
[[maybe_unused]] DEVICE void next_may_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
#else
[[maybe_unused]] DEVICE void previous_done() {}
[[maybe_unused]] DEVICE void next_may_begin() {}
#endif

#if HALF
#define TYPE "f16"
#else
#define TYPE "bf16"
#endif
[[maybe_unused]] DEVICE float multiplied(float a, float b) { return __fmul_rn(a, b); }  // rounded, never fused with a sum
DEVICE u32 add_pair(u32 a, u32 b) {  // as a * 1 + b, which compute capability 8.0 has for bfloat16 too
    u32 d;
    asm("fma.rn." TYPE "x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(HALF ? 0x3C003C00u : 0x3F803F80u), "r"(b));
    return d;
}
[[maybe_unused]] DEVICE u32 scale_by(u32 a, u32 b) {  // a * b - 0, rounded once
    u32 d;
    asm("fma.rn." TYPE "x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));
    return d;
}
[[maybe_unused]] DEVICE u32 multiply_add(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn." TYPE "x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
DEVICE u32 under_exponent(u32 bits, u32 mask, u32 exponent) {  // (bits & mask) | exponent, in one instruction
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(bits), "r"(mask), "r"(exponent));
    return d;
}
DEVICE u32 round_pair(float low, float high) {
    u32 d;
    asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}
[[maybe_unused]] DEVICE u32 kept(u32 v) {  // in a register, never made again
    asm volatile("" : "+r"(v));
    return v;
}
// Shared memory by its address; what is read was written before the last barrier and the last `kept`.
[[maybe_unused]] DEVICE u32 shared_place(const void *p) { return (u32)__cvta_generic_to_shared(p); }
[[maybe_unused]] DEVICE u32 shared_word(u32 at) {
    u32 v;
    asm("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at));
    return v;
}
[[maybe_unused]] DEVICE uint4 shared_if(bool wanted, u32 at) {  // zeros where it is not
    uint4 v;
    asm("{.reg .pred p; setp.ne.u32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
        "@p ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];}"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w) : "r"(at), "r"((u32)wanted));
    return v;
}
[[maybe_unused]] DEVICE float from_lane(float v, int flip) { return __shfl_xor_sync(0xFFFFFFFFu, v, flip); }
[[maybe_unused]] DEVICE u32 word_of(u32 v, int lane) { return __shfl_sync(0xFFFFFFFFu, v, lane); }
[[maybe_unused]] DEVICE float power_of_two(float v) {
    float d;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(v));
    return d;
}
[[maybe_unused]] DEVICE float inverse_root(float v) { return rsqrtf(v); }
[[maybe_unused]] DEVICE float near_inverse(float v) {
    float d;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(v));
    return d;
}
[[maybe_unused]] DEVICE float logistic(float v) { return 1.0f / (1.0f + expf(-v)); }
[[maybe_unused]] DEVICE u32 both_low(u32 v) {  // its lower half twice, which an operation can take as it lies
    u32 d;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {l, l};}" : "=r"(d) : "r"(v));
    return d;
}
[[maybe_unused]] DEVICE u32 both_high(u32 v) {
    u32 d;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {h, h};}" : "=r"(d) : "r"(v));
    return d;
}
DEVICE float widen(u32 low) {
#if HALF
    float f;
    asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(f) : "r"(low));
    return f;
#else
    return bits_float(low << 16);
#endif
}
[[maybe_unused]] DEVICE float widen_f16(u32 low) {
    float f;
    asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(f) : "r"(low));
    return f;
}
DEVICE void multiply(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// The same from sums that begin as `c`.
[[maybe_unused]] DEVICE void multiply_from(float (&d)[4], const float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
#endif

#ifdef SCALE
struct Scales {
    const void *scale;
    const u8 *codes;        // SCALE 3: scale = levels[codes] * scale[index / 256] + *offset
    const float *levels;
    const float *offset;
    const void *zero;
    int groups, zero_bytes;  // per row
};

DEVICE float load_scale(const Scales &p, int out, int group) {
    long long index = (long long)out * p.groups + group;
#if SCALE == 0
    return bits_float((u32)((const u16 *)p.scale)[index] << 16);
#elif SCALE == 1
    return widen_f16(((const u16 *)p.scale)[index]);
#elif SCALE == 2
    return ((const float *)p.scale)[index];
#else
    return p.levels[p.codes[index]] * ((const float *)p.scale)[index >> 8] + *p.offset;
#endif
}

DEVICE float load_zero(const Scales &p, int out, int group) {
#if ZERO == 1
    const u8 *row = (const u8 *)p.zero + (long long)out * p.zero_bytes;
    int bit = group * BITS, byte = bit >> 3;
    u32 two = row[byte] | (((bit & 7) + BITS > 8 ? row[byte + 1] : 0u) << 8);
    return (float)((two >> (bit & 7)) & ((1u << BITS) - 1));
#elif ZERO == 2
    return widen_f16(((const u16 *)p.zero)[(long long)out * p.groups + group]);
#else
    return ZERO == 3 ? 0.5f : 0.0f;
#endif
}
#endif

