// What few.cu does besides multiplying, for the one row of a token: makes x a norm, gates, or adds to what y had.
#if NORMED
#define COLUMNS NORMED
#include "norm.cuh"
#endif
#if GATED
#include "gate.cuh"
#endif
static_assert(!NORMED && !GATED && !ONTO || ROWS == 1, "one row");
static_assert(!GATED || PARTS == 2, "gate and up");
static_assert(!ONTO || PARTS == 1, "one weight");

struct Several {  // weights of the same format and columns, which share x
    Params part[PARTS];
#if NORMED
    const u16 *norm;  // its weight
    float epsilon;
#endif
};
constexpr int TILE_OUTS = GATED ? 8 : 16;  // of each weight

// What y has where a thread's result goes, asked for before a tile is multiplied.
DEVICE u32 old_of(const Params &p, int tile, int tid) {
    int out = tile * TILE_OUTS + tid;
    return ONTO && tid < TILE_OUTS && out < p.outs ? p.y[out] : 0;
}

// A result of a part, and of `up` where that is the gate; `old` as above.
DEVICE void put(const Several &all, const Params &p, int row, int out, float sum, float up, u32 old) {
#if GATED
    p.y[out] = (u16)gated(rounded(all.part[0], out, sum), rounded(all.part[1], out, up));
#elif ONTO
    p.y[out] = (u16)add_pair(old, rounded(p, out, sum));
#else
    store(p, row, out, sum);
#endif
}
