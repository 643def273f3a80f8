// How many.cu adds up a tile: steps of codes are decoded while products of those before run.

DEVICE void release(const Block &b, int slot, int lane) {  // by one branch, or products would wait for each other
#if PAIR > 1
    if (lane < PAIR) arrive(b.empty + slot, b.share * PAIR + lane);
#else
    if (lane == 0) arrive(b.empty + slot);
#endif
}

// A step's codes are in registers: its place may be written again.
DEVICE void release_codes(const Block &b, Codes &last, int slot, int lane) {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int i = 0; i < ROW_WORDS; i++) last.words[h][i] = kept(last.words[h][i]);
    if (lane == 0) arrive(b.spent + slot);
}

// Where a step lies among `MOST`, and the phase of its barrier.
struct Place {
    int slot, phase;
};
template <int MOST> DEVICE Place after(const Place &at) {
    bool last = at.slot == MOST - 1;
    return {last ? 0 : at.slot + 1, last ? at.phase ^ 1 : at.phase};
}
struct Places {
    Place codes, x;  // x: pairs of pieces
};
DEVICE const u8 *codes_at(const Block &b, int slot, const Lane &w) { return b.stages + slot * W_BYTES + w.codes; }
DEVICE const u8 *rows_at(const Block &b, const Place &at, int second) { return b.rows + (2 * at.slot + second) * X_PIECE; }

// All steps of a tile, from `at` on, which moves on.
#if LATE
struct Pieces {
    u32 a[2][4][4];
    Slot s[2];
};
DEVICE void decode_piece(Pieces &v, int piece, Scaling &r, const Weight &p, const Block &b, const Lane &w, int place, int step) {
    const u8 *codes = codes_at(b, place, w);
    constexpr int EACH = SLOT / 64;
    int slot = step * SLOTS + piece / EACH;
    if (piece % EACH == 0) turn_scales(r, p, w, slot);
    v.s[piece & 1] = slot_of(r.now, w, slot);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        Codes loaded = load_codes(codes, w, 2 * piece + i);
#pragma unroll
        for (int j = 0; j < 2; j++) decode_step(v.a[piece & 1][2 * i + j], loaded, j, v.s[piece & 1], w);
        if (piece == 3 && i == 1) release_codes(b, loaded, place, w.lane);
    }
}
DEVICE void multiply_piece(float (&sums)[NT][4], u32 (&a)[4][4], const u8 *x) {
    auto right = describe_rows(x);
#pragma unroll
    for (int i = 0; i < 4; i++) settle(a[i]);
    begin_products();
#pragma unroll
    for (int i = 0; i < 4; i++) multiply_fresh(sums, a[i], right, i, i == 0);
    end_products();
}
template <bool LAST> DEVICE void add_step(Sums &sums, Pieces &v, Scaling &r, const Weight &p, const Block &b, const Lane &w, Places &at, int step) {
    at.codes.slot = uniform(at.codes.slot), at.x.slot = uniform(at.x.slot);
    Place next = after<STAGES>(at.codes);
#pragma unroll
    for (int piece = 0; piece < 4; piece++) {
        int second = piece & 1, slot = 2 * at.x.slot + second;
        await(b.ready + slot, at.x.phase);
        multiply_piece(sums.part, v.a[second], rows_at(b, at.x, second));
        Slot s = v.s[second];
        if (piece < 3) {
            decode_piece(v, piece + 1, r, p, b, w, at.codes.slot, step);
        } else if (!LAST) {
            await(b.full + next.slot, next.phase);
            decode_piece(v, 0, r, p, b, w, next.slot, step + 1);
        }
        products_left<0>();
        settle(sums.part);
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) sums.all[n][e] += s.scale[e >> 1] * sums.part[n][e];
        release(b, slot, w.lane);
        if (second) at.x = after<LEAD / 2>(at.x);
    }
    at.codes = next;
}
DEVICE void add_up(Sums &sums, Scaling &r, const Weight &p, const Block &b, const Lane &w, Places &at) {
    Pieces v;
    if (b.steps == 0) return;
    await(b.full + at.codes.slot, at.codes.phase);
    decode_piece(v, 0, r, p, b, w, at.codes.slot, 0);
#pragma unroll 1
    for (int step = 0; step < b.steps - 1; step++) add_step<false>(sums, v, r, p, b, w, at, step);
    add_step<true>(sums, v, r, p, b, w, at, b.steps - 1);
}
#else
template <bool LOW> DEVICE void add_up(Sums &sums, Scaling &r, const Weight &p, const Block &b, const Lane &w, Places &at) {
    constexpr int EACH = SLOT / 16;  // times 16 columns that share a scale
    constexpr int TURNS = BK / 16, UNITS = TURNS / PER_UNIT;
    constexpr int READ = TURNS - (RUN && 2 * EACH < PER_UNIT ? 2 * EACH : PER_UNIT);  // then a step's last codes, and scales, are
    u32 a[RING][4];
    if (b.steps == 0) return;
    await(b.full + at.codes.slot, at.codes.phase);
    Codes codes[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) codes[i] = load_codes(codes_at(b, at.codes.slot, w), w, i);
#if RUN
    ask_slot(r, b, w, at.codes.slot, 0);
#endif
    int before = 0;
#pragma unroll 1
    for (int step = 0; step < b.steps; step++) {
        at.codes.slot = uniform(at.codes.slot), at.x.slot = uniform(at.x.slot);
        Place next = after<STAGES>(at.codes);
        Slot s;
        u64 right;
#pragma unroll
        for (int k = 0; k < TURNS; k++) {  // 16 columns each
            int unit = k / PER_UNIT, piece = k / 4, now = 2 * at.x.slot + (piece & 1), load = unit + AHEAD;
            if (k % EACH == 0) s = take_slot(r, p, b, w, at.codes.slot, step, k / EACH);
            decode_step(a[k % RING], codes[unit % AHEAD], k % PER_UNIT, s, w);
#if RUN
            if (k == READ) hold_slot(r);
#endif
            if (k == READ) release_codes(b, codes[unit % AHEAD], at.codes.slot, w.lane);
            bool loads = k % PER_UNIT == PER_UNIT - 1;
            if (loads && load < UNITS) codes[unit % AHEAD] = load_codes(codes_at(b, at.codes.slot, w), w, load);
            if (k % 4 == BATCH - 1) {
                await(b.ready + now, at.x.phase);
                right = describe_rows(rows_at(b, at.x, piece & 1));
            }
            settle(a[k % RING]);
            if ((k + 1) % BATCH == 0) {
                begin_products();
#pragma unroll
                for (int i = k + 1 - BATCH; i <= k; i++) multiply_step<LOW>(sums.all, a[i % RING], right, i % 4);
                end_products();
                products_left<RING / BATCH - 1>();
            }
            if (k % 4 == RING - 1 - BATCH) {  // those of the piece before are done
                if (piece || step) release(b, before, w.lane);
                before = now;
            }
            if (k % 8 == 7) at.x = after<LEAD / 2>(at.x);
            if (loads && load == UNITS && step + 1 < b.steps) await(b.full + next.slot, next.phase);
#if RUN
            if (k == TURNS - 1) ask_slot(r, b, w, next.slot, 0);
#endif
            if (loads && load >= UNITS) codes[unit % AHEAD] = load_codes(codes_at(b, next.slot, w), w, load - UNITS);  // after the last: unused
        }
        at.codes = next;
    }
    products_left<0>();
    settle(sums.all);
    release(b, before, w.lane);
}
#endif
