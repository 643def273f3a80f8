// y = round(silu(gate)) * up, rounded, elementwise, eight at a time. Built after common.cuh. Macro: THREADS.
#include "gate.cuh"

struct Params {
    const uint4 *gate, *up;
    uint4 *y;
    int units;
};

extern "C" __global__ void __launch_bounds__(THREADS) gate(const Params p) {
    next_may_begin(), previous_done();
    int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= p.units) return;
    uint4 g = p.gate[i], u = p.up[i];
    p.y[i] = make_uint4(gated(g.x, u.x), gated(g.y, u.y), gated(g.z, u.z), gated(g.w, u.w));
}
