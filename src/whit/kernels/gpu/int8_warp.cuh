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
[[maybe_unused]] DEVICE u32 exchange(u32 v, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, v, mask); }
DEVICE float multiplied(float a, float b) { return __fmul_rn(a, b); }  // rounded, never fused with a sum
[[maybe_unused]] DEVICE float divided(float a, float b) { return __fdiv_rn(a, b); }
[[maybe_unused]] DEVICE int nearest(float v) { return __float2int_rn(v); }  // 0 for a NaN
[[maybe_unused]] DEVICE int count_bits(u32 v) { return __popc(v); }
#endif

constexpr int OUTLIERS_AT_ONCE = 8;  // columns that lie in shared memory together
