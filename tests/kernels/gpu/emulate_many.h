// What many.cu needs beyond emulate_cluster.h: Hopper's product, whose left side lies in registers.
static float of_lane(float v, int lane) { return bits_float(together(float_bits(v))[lane]); }
static u32 load_shared(u32 at) { u32 v; memcpy(&v, (const u8 *)shared + at - BEGINS_AT, 4); return v; }
static u32 transpose(u32 v) {  // lane 4 g + t holds columns 2 t and 2 t + 1 of row g
    const u32 *all = together(v);
    int g = current % 32 / 4, t = current % 4;
    auto at = [&](int row, int column) { return all[row * 4 + column / 2] >> 16 * (column % 2) & 0xFFFF; };
    return at(2 * t, g) | at(2 * t + 1, g) << 16;
}
[[maybe_unused]] static void lay_turned(void *row, const u32 (&v)[4]) {
    const u32 *places = together((u32)((u8 *)row - (u8 *)shared));
    int lane = current % 32;
    for (int i = 0; i < 4; i++)
        for (int e = 0; e < 2; e++) {
            u16 one = v[i] >> 16 * e;
            memcpy((u8 *)shared + places[8 * i + lane % 4 * 2 + e] + lane / 4 * 2, &one, 2);
        }
}
static int uniform(int v) { return v; }
#define __align__(bytes)
static void prefetch_map(const Map &) {}
static void __trap() { __builtin_trap(); }
template <int COUNT> static void hold_registers() {}
template <int COUNT> static void give_registers() {}
[[maybe_unused]] static void count_round(u32 *at, u32 most) { *at = *at + 1 < most ? *at + 1 : 0; }
[[maybe_unused]] static void await_count(const u32 *at, u32 least) {
    while (*at < least) yield();
    threadIdx.x = current % threads;
}
static float4 load_sums(const float4 *p) { return *p; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static u64 describe_rows(const void *tile) { return (u64)tile; }
static void begin_products() {}
static void end_products() {}
template <int N> static void products_left() {}
template <class T> static void settle(T &) {}

struct Left { u32 a[2][32][4]; int count, turn; };
static std::vector<Left> lefts(256);
static void multiply_fresh(float (&d)[NT][4], u32 (&a)[4], u64 x, int step, int fresh, int tiles = NT) {
    Left &w = lefts[current / 32];
    int turn = w.turn, lane = current % 32;
    memcpy(w.a[turn & 1][lane], a, 16);
    if (++w.count == 32) w.count = 0, w.turn++;
    while (w.turn == turn) yield();
    threadIdx.x = current % threads;
    const u8 *tile = (const u8 *)x;
    if (((const u8 *)tile - (const u8 *)shared + BEGINS_AT) % 1024) __builtin_trap();
    for (int n = 0; n < tiles; n++)
        for (int e = 0; e < 4; e++) {
            int out = lane / 4, row = n * 8 + lane % 4 * 2 + e % 2;
            double sum = fresh ? 0 : d[n][e];
            for (int k = 0; k < 16; k++) {
                int byte = (step * 16 + k) * 2;
                const u8 *at = tile + row * 128 + ((byte >> 4 ^ row & 7) << 4 | byte & 15);
                u32 left = w.a[turn & 1][out * 4 + k % 8 / 2][e / 2 + 2 * (k / 8)];
                sum += (double)widen(k % 2 ? left >> 16 : left & 0xFFFF) * widen(*(const u16 *)at);
            }
            d[n][e] = sum;
        }
}
template <bool LOW> static void multiply_step(float (&d)[NT][4], u32 (&a)[4], u64 x, int step) {
    multiply_fresh(d, a, x, step, 0, LOW ? NT / 2 : NT);
}
