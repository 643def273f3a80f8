// Rows counted by the kernel that makes them, and awaited by the one that multiplies them meanwhile.

#ifndef EMULATED
[[maybe_unused]] DEVICE u32 counted(const u32 *count) {
    u32 v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(count) : "memory");
    return v;
}
[[maybe_unused]] DEVICE void count_row(u32 *count) { asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory"); }
// What was written plainly is to be read by the engine that copies tiles, of another multiprocessor.
DEVICE void between_engines() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
[[maybe_unused]] DEVICE void pause() { asm volatile("nanosleep.u32 64;" ::: "memory"); }
#endif
