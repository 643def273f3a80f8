// What digits.cu needs beyond emulate_cluster.h.
static void copy_row(void *to, const void *from, u32 bytes, u64 *barrier) {
    if ((uintptr_t)from % 16 || bytes % 16 || ((u8 *)to - (u8 *)shared) % 16) __builtin_trap();
    memcpy(to, from, bytes);
    Barrier *b = (Barrier *)barrier;
    b->bytes -= bytes, settled(b);
}
static void publish_shared() {}
static int to_integer(float v) { return std::isfinite(v) ? (int)std::lrint((double)v) : 0; }

// mma.m16n8k32 of bytes: lane 4 g + t holds A rows g and g + 8, columns 4 t to 4 t + 3 and those plus 16; B the same.
struct Bytes { u32 a[32][4], b[32][2]; int d[32][4]; int count, turn; };
static std::vector<Bytes> byte_warps(64);
static void multiply_bytes(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    Bytes &w = byte_warps[current / 32];
    int lane = current % 32, turn = w.turn;
    w.a[lane][0] = a0, w.a[lane][1] = a1, w.a[lane][2] = a2, w.a[lane][3] = a3, w.b[lane][0] = b0, w.b[lane][1] = b1;
    if (++w.count == 32) {
        for (int l = 0; l < 32; l++)
            for (int e = 0; e < 4; e++) {
                int row = l / 4 + 8 * (e / 2), column = 2 * (l % 4) + e % 2, sum = 0;
                for (int k = 0; k < 32; k++) {
                    u32 a = w.a[row % 8 * 4 + k % 16 / 4][row / 8 + 2 * (k / 16)], b = w.b[column * 4 + k % 16 / 4][k / 16];
                    sum += (int)(u8)(a >> 8 * (k % 4)) * (int)(int8_t)(b >> 8 * (k % 4));
                }
                w.d[l][e] = sum;
            }
        w.count = 0, w.turn++;
    }
    while (w.turn == turn) yield();
    threadIdx.x = current % threads;
    for (int e = 0; e < 4; e++) d[e] += w.d[lane][e];
}
