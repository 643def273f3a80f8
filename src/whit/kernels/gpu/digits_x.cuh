// Operands of digits.cu: codes of W as they lie in their bytes, and x in digits of base 256 in the same order.

// By how many bits the codes of an operand are too high: `half` of product `i`.
DEVICE constexpr int shift_of(int i, int half) {
    return BITS == 2 ? 2 * i : BITS == 4 ? 4 * (i % 2) : 0x52041030 >> 4 * (2 * i + half) & 15;
}
// The operands of a row's 32 codes: four codes each, one of every byte. Codes of 3 bits: eight of every three bytes, two
// of which lie in two bytes each.
DEVICE void take(u32 (&to)[PRODUCTS][2], const u32 (&words)[WORDS]) {
    if constexpr (BITS == 3) {
        u32 low = permute(permute(words[0], words[1], 0x0630), words[2], 0x5210);
        u32 middle = permute(permute(words[0], words[1], 0x0741), words[2], 0x6210);
        u32 high = permute(permute(words[0], words[1], 0x0052), words[WORDS - 1], 0x7410);
        to[0][0] = low & 0x07070707u, to[0][1] = low & 0x38383838u;
        to[1][0] = under_exponent(middle << 2, 0x04040404u, low >> 6 & 0x03030303u), to[1][1] = middle & 0x0E0E0E0Eu;
        to[2][0] = middle & 0x70707070u, to[2][1] = under_exponent(high << 1, 0x06060606u, middle >> 7 & 0x01010101u);
        to[3][0] = high & 0x1C1C1C1Cu, to[3][1] = high & 0xE0E0E0E0u;
    } else {
#pragma unroll
        for (int i = 0; i < PRODUCTS; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) to[i][half] = words[(BITS == 4 ? i / 2 * 2 : 0) + half] & ((1u << BITS) - 1 << shift_of(i, half)) * 0x01010101u;
    }
}

// Four words of four bytes, the other way round.
DEVICE void transpose(u32 (&v)[4]) {
    u32 a = permute(v[0], v[1], 0x5140), b = permute(v[2], v[3], 0x5140), c = permute(v[0], v[1], 0x7362), d = permute(v[2], v[3], 0x7362);
    v[0] = permute(a, b, 0x5410), v[1] = permute(a, b, 0x7632), v[2] = permute(c, d, 0x5410), v[3] = permute(c, d, 0x7632);
}

// A warp's x as digits: two lanes have the 32 columns of a thread's codes. Gives what undoes the factor.
DEVICE float lay_digits(u32 *digits, const u16 *x, int lane) {
    int half = lane & 1;
    const u16 *from = x + lane / 2 * 32 + half * (BITS == 3 ? 4 : 16);
    float v[16];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint2 held = *(const uint2 *)(from + i * (BITS == 3 ? 8 : 4));
        v[4 * i] = widen(held.x & 0xFFFF), v[4 * i + 1] = widen(held.x >> 16);
        v[4 * i + 2] = widen(held.y & 0xFFFF), v[4 * i + 3] = widen(held.y >> 16);
    }
    u32 most = 0;  // as bits, among which those of NaNs are the largest
#pragma unroll
    for (int i = 0; i < 16; i++) most = max(most, float_bits(v[i]) & 0x7FFFFFFFu);
#pragma unroll
    for (int flip = 16; flip; flip /= 2) most = max(most, float_bits(from_lane(bits_float(most), flip)));
    u32 exponent = max(most >> 23, 64u);
    int step = lane >> 2 & 3, t = (lane >> 4) * 2 + (lane >> 1 & 1);
#pragma unroll
    for (int k = 0; k < 4; k++) {  // operands of four columns
        int product = BITS == 2 ? k : half * 2 + (BITS == 4 ? k % 2 : k / 2), word = BITS == 2 ? half : BITS == 4 ? k / 2 : k % 2;
        int shift = BITS == 3 && half ? shift_of(2 + k / 2, k % 2) : shift_of(BITS == 3 ? k / 2 : k, k % 2);
        float factor = bits_float((282 - exponent - shift) << 23);  // all become less than 2^29
        u32 d[4];
#pragma unroll
        for (int b = 0; b < 4; b++) {
            int at = BITS == 4 ? k / 2 * 8 + b * 2 + k % 2 : 4 * b + k;
            d[b] = (u32)to_integer(v[at] * factor) + 0x808080u;
        }
        transpose(d);
#pragma unroll
        for (int c = 0; c < 4; c++)
            digits[(c * 4 + t) * DIGIT_ROW + (step * PRODUCTS + product) * 2 + word] = c < 3 ? d[c] ^ 0x80808080u : d[c];
    }
    return most >= 0x7F800000u ? bits_float(0x7FC00000u) : bits_float((exponent - 28) << 23);
}

struct Held {  // of x, by steps
    u32 digits[STEPS][PRODUCTS][2];
};
struct Begin {  // what sums begin at, by steps
    int first[STEPS][2];
};
DEVICE void load_digits(Held &held, const u32 *digits, int lane) {
    int t = lane & 3, column = lane >> 2;
    const uint4 *from = (const uint4 *)(digits + ((column & 3) * 4 + t) * DIGIT_ROW);
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
#pragma unroll
        for (int i = 0; i < PRODUCTS; i += 2) {
            uint4 v = column / 4 == t / 2 ? from[(step * PRODUCTS + i) / 2] : make_uint4(0, 0, 0, 0);
            held.digits[step][i][0] = v.x, held.digits[step][i][1] = v.y;
            held.digits[step][i + 1][0] = v.z, held.digits[step][i + 1][1] = v.w;
        }
    }
}
DEVICE void set_begin(Begin &begin, const Held &held) {
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        int zero[4] = {};
#pragma unroll
        for (int i = 0; i < PRODUCTS; i++) {
            u32 low = (OFFSET << shift_of(i, 0)) * 0x01010101u, high = (OFFSET << shift_of(i, 1)) * 0x01010101u;
            multiply_bytes(zero, low, low, high, high, held.digits[step][i][0], held.digits[step][i][1]);
        }
        int first = step % TOGETHER ? 0 : FIRST;
        begin.first[step][0] = first - zero[0], begin.first[step][1] = first - zero[1];
    }
}
