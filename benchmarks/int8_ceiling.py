"""What a processor multiplies in bytes at most: python benchmarks/int8_ceiling.py [--threads 2]

Compiles a loop of products of registers alone (AMX's tiles, AVX-512's VNNI), each thread by itself: operations (two to
a product) a second of all threads together, the best of several runs. Tiles hold random bytes: a processor takes less
time and less power for those that were never loaded. What is not there is left out.
"""

from __future__ import annotations

import argparse
import subprocess
from concurrent.futures import ThreadPoolExecutor
from ctypes import CDLL, c_double, c_int64
from pathlib import Path
from tempfile import TemporaryDirectory

from whit.kernels.cpu import library
from whit.kernels.cpu.build import find_compiler

ROUNDS = 5
COUNTS = {"tiles": 2_000_000, "vectors": 40_000_000}  # turns of the loops: some tenths of a second
SOURCE = r"""
#include <chrono>
#include <cstdint>
#include <cstring>
#include <immintrin.h>
typedef std::chrono::steady_clock Clock;
static double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }
extern "C" double tiles(int64_t count) {  // operations a second
  alignas(64) uint8_t shapes[64];
  memset(shapes, 0, 64);
  shapes[0] = 1;
  for (int t = 0; t < 8; t++) shapes[16 + 2 * t] = 64, shapes[48 + t] = 16;
  __asm__ volatile("ldtilecfg %0" : : "m"(shapes) : "memory");
  alignas(64) uint8_t bytes[2048];
  for (int i = 0; i < 2048; i++) bytes[i] = (uint8_t)(i * i * 31 + i * 7);
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm6\n tileloadd (%2,%1,1), %%tmm7"
                   : : "r"(bytes), "r"((int64_t)64), "r"(bytes + 1024) : "memory");
  const auto start = Clock::now();
  for (int64_t i = 0; i < count; i++)
    __asm__ volatile("tdpbusd %tmm7, %tmm6, %tmm0\n tdpbusd %tmm7, %tmm6, %tmm1\n tdpbusd %tmm7, %tmm6, %tmm2\n"
                     "tdpbusd %tmm7, %tmm6, %tmm3\n tdpbusd %tmm7, %tmm6, %tmm4\n tdpbusd %tmm7, %tmm6, %tmm5\n");
  const double seconds = since(start);
  __asm__ volatile("tilerelease");
  return 6 * 2 * 16384.0 * (double)count / seconds;
}
extern "C" double vectors(int64_t count) {
  __m512i acc[12], a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(2);
#pragma GCC unroll 12
  for (int i = 0; i < 12; i++) acc[i] = _mm512_set1_epi32(i);
  const auto start = Clock::now();
  for (int64_t i = 0; i < count; i++) {
#pragma GCC unroll 12
    for (int k = 0; k < 12; k++) __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(acc[k]) : "v"(a), "v"(b));
  }
  return 12 * 2 * 64.0 * (double)count / since(start);
}
"""


def ceilings(threads: int) -> dict[str, float]:
    """Operations a second of `tiles` and `vectors`, of those that this processor has."""
    compiled, compiler = library(), find_compiler()
    if isinstance(compiled, str) or compiler is None:
        return {}
    have = [name for name, isa in (("tiles", "amx"), ("vectors", "avx512_vnni")) if isa in compiled.isas8]
    with TemporaryDirectory() as folder, ThreadPoolExecutor(threads) as pool:
        source = Path(folder) / "loops.cpp"
        source.write_text(SOURCE)
        flags = ("-O2", "-shared", "-fPIC", "-mavx512f", "-mavx512vnni")
        subprocess.run([compiler, *flags, str(source), "-o", f"{folder}/loops.so"], check=True)
        handle, found = CDLL(f"{folder}/loops.so"), dict[str, float]()
        for name in have:
            loop = getattr(handle, name)
            loop.restype, loop.argtypes = c_double, [c_int64]
            found[name] = max(sum(pool.map(loop, [COUNTS[name]] * threads)) for _ in range(ROUNDS))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    threads = parser.parse_args().threads
    for name, rate in ceilings(threads).items():
        print(f"{name}: {rate / 1e12:.2f} TOP/s by {threads} threads")


if __name__ == "__main__":
    main()
