// What this processor runs, and the kernels that a product takes for it.
#include "isa.h"

#include "team.h"
#include "tiles.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#define WHIT_X86 1
#endif

namespace {

#if defined(WHIT_X86)
uint64_t enabled_state() {  // XCR0: which registers the operating system saves
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t)high << 32 | low;
}

int processor_has(int isa) {
  unsigned a, b, c, d, a7, b7, c7, d7, a71 = 0, b71, c71, d71;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !__get_cpuid_count(7, 0, &a7, &b7, &c7, &d7)) return 0;
  const unsigned osxsave = 1u << 27, avx = 1u << 28, fma = 1u << 12, f16c = 1u << 29;
  if ((c & (osxsave | avx | fma | f16c)) != (osxsave | avx | fma | f16c)) return 0;
  uint64_t state = enabled_state();
  bool avx2 = (state & 6) == 6 && (b7 >> 5 & 1);
  const unsigned needed = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
  bool avx512 = avx2 && (state & 0xe6) == 0xe6 && (b7 & needed) == needed;
  if (isa == WHIT_AVX2) return avx2;
  if (isa == WHIT_AVX512) return avx512;
  if (a7 >= 1) __get_cpuid_count(7, 1, &a71, &b71, &c71, &d71);
  if (!avx512 || !(a71 >> 5 & 1)) return 0;
  return isa == WHIT_AVX512_BF16 || (isa == WHIT_AMX && (c7 >> 1 & 1) && (whit_amx() & AMX_BF16));  // VBMI
}
#else
int processor_has(int) { return 0; }
#endif

// Whether 32 products of bfloat16 take longer than twice 16 of float32: 2.1 cycles, whatever their width, and .55 each on
// an Emerald Rapids (benchmarks/results/cpu_ways_amx.md).
bool slow_pairs() {
#if defined(WHIT_X86)
  unsigned a, b, c, d;
  return __get_cpuid(0, &a, &b, &c, &d) && b == 0x756e6547 && d == 0x49656e69 && c == 0x6c65746e;  // GenuineIntel
#else
  return false;
#endif
}

}  // namespace

const Kernels* whit_kernels_for(int isa) {
  switch (isa) {
    case WHIT_SCALAR: return &whit_kernels_scalar;
#if defined(WHIT_HAVE_AVX2)
    case WHIT_AVX2: return &whit_kernels_avx2;
#endif
#if defined(WHIT_HAVE_AVX512)
    case WHIT_AVX512: return &whit_kernels_avx512;
#endif
#if defined(WHIT_HAVE_AVX512_BF16)
    case WHIT_AVX512_BF16: return &whit_kernels_avx512_bf16;
#if defined(WHIT_HAVE_TILES_BF16) && defined(WHIT_HAVE_MANY_BF16)
    case WHIT_AMX: return &whit_kernels_avx512_bf16;  // and tiles
#endif
#endif
    default: return nullptr;
  }
}

const Kernels* whit_kernels(const whit_weight& w, int type, int isa) {
  if (isa < WHIT_AVX512_BF16) return whit_kernels_for(isa);
  if (type != WHIT_BF16) return whit_kernels_for(WHIT_AVX512);
  static const bool slow = slow_pairs();
  if (slow && !w.digit_bytes) return whit_kernels_for(WHIT_AVX512);
#if defined(WHIT_HAVE_AVX512_BF16)
  if (w.bits == 8 && w.consecutive) return &whit_kernels_bf16_bytes;
  if (w.bits > 6) return whit_kernels_for(WHIT_AVX512);
  for (int i = 0; i < 1 << w.bits; i++)
    if (w.levels[i] != bf16_to_float(float_to_bf16(w.levels[i])))
      return w.bits > 4 ? whit_kernels_for(WHIT_AVX512) : &whit_kernels_bf16_tables;
#endif
  return whit_kernels_for(isa);
}

int whit_has(int isa) { return whit_kernels_for(isa) != nullptr && (isa == WHIT_SCALAR || processor_has(isa)); }
