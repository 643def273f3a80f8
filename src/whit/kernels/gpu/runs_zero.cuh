// How weights of ggml's types are rounded once though their scales have more bits than operands: a scale is the sum of
// two operands, and of a minimum (`less`) the nearest whole number of scales is taken off the levels, where nothing is
// rounded, so that what is left of it is at most half a scale.

constexpr float MOST_ZERO = 64;  // of scales: below 256 integers are exact

DEVICE float nearest_zero(float scale, float less) {
    float root = inverse_root(scale * scale), steps = less * scale * root * root;
    steps = steps < MOST_ZERO ? steps > -MOST_ZERO ? steps : -MOST_ZERO : MOST_ZERO;  // also where the scale is 0
    return steps + 12582912.0f - 12582912.0f;
}
