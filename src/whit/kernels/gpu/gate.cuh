// round(silu(gate)) * up, rounded, of two numbers at a time.
DEVICE u32 gated(u32 gate, u32 up) {
    float low = widen(gate & 0xFFFF), high = widen(gate >> 16);
    return scale_by(round_pair(low * logistic(low), high * logistic(high)), up);
}
