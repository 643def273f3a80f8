// What the kernels of int8 activations need beyond emulate_cluster.h.
static void await_earlier() {}
static void let_next_begin() {}
static uint4 fresh16(const void *p) { return load16(p); }
static uint4 last16(const void *p) { return load16(p); }
template <class T> static T fresh(const T *p) { return *p; }
static float divided(float a, float b) { return a / b; }
static float clamped(float v, float most) { return std::fmin(std::fmax(v, -most), most); }
static u32 larger_pair(u32 a, u32 b) { return max(a & 0xFFFF, b & 0xFFFF) | max(a >> 16, b >> 16) << 16; }
static int byte_sum(u32 bytes, int sum) { for (int i = 0; i < 4; i++) sum += (signed char)(bytes >> 8 * i); return sum; }
static int count_bits(u32 v) { return __builtin_popcount(v); }

static u32 warp_max(u32 v) { const u32 *all = together(v); return *std::max_element(all, all + 32); }
static int warp_sum(int v) { const u32 *all = together(v); u32 s = 0; for (int i = 0; i < 32; i++) s += all[i]; return s; }
static int warp_prefix(int v) {
    const u32 *all = together(v);
    u32 s = 0;
    for (int i = 0; i <= current % 32; i++) s += all[i];
    return s;
}
static int from_lane_number(int v, int lane) { return together(v)[lane]; }
static u32 lanes_with(bool v) {
    const u32 *all = together(v);
    u32 s = 0;
    for (int i = 0; i < 32; i++) s |= all[i] << i;
    return s;
}
// E4M3: steps of 2^-9 below 2^-6, else of an eighth of the power of two below; halves to even.
static u32 float8(float v) {
    u32 sign = std::signbit(v) ? 0x80 : 0;
    if (std::isnan(v)) return 0x7F;
    float size = std::fmin(std::fabs(v), 448);
    int e = size < 0.015625f ? -6 : std::ilogb(size);
    int steps = (int)std::nearbyint(std::ldexp(size, 3 - e));  // 8 to 16, or less where e is -6
    return sign | (u32)(steps + 8 * (e + 6));
}
static u32 float8_pair(float low, float high) { return float8(low) | float8(high) << 8; }
// mma.m16n8k32 of bytes: lane 4 g + t holds of A rows g and g + 8, columns 4 t to 4 t + 3 and those plus 16.
struct Bytes { u32 a[32][4], b[32][2]; int count, turn, d[32][4]; };
static std::vector<Bytes> byte_warps(64);
static void multiply_bytes(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    Bytes &w = byte_warps[current / 32];
    int lane = current % 32, turn = w.turn;
    u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
    memcpy(w.a[lane], a, 16), memcpy(w.b[lane], b, 8);
    if (++w.count == 32) {
        for (int l = 0; l < 32; l++)
            for (int e = 0; e < 4; e++) {
                int row = l / 4 + 8 * (e / 2), column = 2 * (l % 4) + e % 2, sum = 0;
                for (int k = 0; k < 32; k++) {
                    u32 left = w.a[row % 8 * 4 + k % 16 / 4][row / 8 + 2 * (k / 16)], right = w.b[column * 4 + k % 16 / 4][k / 16];
                    sum += (int)(left >> 8 * (k % 4) & 0xFF) * (signed char)(right >> 8 * (k % 4));
                }
                w.d[l][e] = sum;
            }
        w.count = 0, w.turn++;
    }
    while (w.turn == turn) yield();
    threadIdx.x = current % threads;
    for (int e = 0; e < 4; e++) d[e] += w.d[lane][e];
}
// Matrices that the lanes of a warp hold together.
static void lay_matrices(void *row, const u32 (&v)[4]) {
    const u32 *places = together((u32)((u8 *)row - (u8 *)shared));
    int lane = current % 32;
    for (int i = 0; i < 4; i++) memcpy((u8 *)shared + places[8 * i + lane / 4] + 4 * (lane % 4), &v[i], 4);
}
static void atomicOr(u32 *p, u32 v) { *p |= v; }
static void atomicAdd(int *p, int v) { *p += v; }

#ifdef BN
template <int N> static void hold_registers() {}
template <int N> static void give_registers() {}
static u64 describe(const void *tile) { return (u64)tile; }
static void begin_products() {}
static void end_products() {}
template <int LEFT> static void await_products() {}
static void settle(int (&)[BN / 8][4]) {}
#ifdef OUTS  // W is the left tile
typedef u8 Left;
typedef signed char Right;
#else
typedef signed char Left;
typedef u8 Right;
#endif
static void multiply_tiles(int (&d)[BN / 8][4], u64 left, u64 right, int step) {
    const Left *x = (const Left *)left;
    const Right *w = (const Right *)right;
    int lane = current % 32, warp = current % threads / 32 % 4;
    for (int j = 0; j < BN / 8; j++)
        for (int e = 0; e < 4; e++) {
            int m = warp * 16 + lane / 4 + e / 2 * 8, n = j * 8 + lane % 4 * 2 + e % 2;
            for (int k = step * 32; k < step * 32 + 32; k++)
                d[j][e] += x[m * 128 + ((k >> 4 ^ m & 7) << 4 | k & 15)] * w[n * 128 + ((k >> 4 ^ n & 7) << 4 | k & 15)];
        }
}
#endif
