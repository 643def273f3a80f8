// Whether this process may use AMX: the processor has it, the system saves its registers, and was asked to.
#include "tiles.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(WHIT_EMULATE_AMX)
int find() { return AMX_BF16 | AMX_INT8; }
#elif defined(__x86_64__) && defined(__linux__)
int find() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return 0;  // OSXSAVE
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return 0;  // XCR0: the configuration and the tiles
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1)) return 0;
  const int has = (d >> 22 & 1 ? AMX_BF16 : 0) | (d >> 25 & 1 ? AMX_INT8 : 0);
  enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };  // Linux gives 8 KB of state to a thread when it first asks
  return has && !syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) ? has : 0;
}
#else
int find() { return 0; }
#endif

}  // namespace

int whit_amx(void) {
  static const int found = find();
  return found;
}
