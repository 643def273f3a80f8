"""Compiles csrc/ into one shared library beside this file: python -m whit.kernels.cpu.build

Needs a C++17 compiler and nothing else. Every instruction set is a file of its own with its own flags; one that this
compiler cannot build is left out. The package's build runs this too, unless the library is there already, and installs
without it where it fails.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "csrc"
LIBRARY = HERE / "libwhit_cpu.so"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
    "-Wno-psabi", "-Wno-unknown-pragmas",
)  # fmt: skip
# Not optimized: instrumented, optimized kernels take minutes to compile, and hide loads that are never used.
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O0")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
BASE = (
    "amx", "decoder", "decoder_scalar", "encoder", "entry", "gram", "int8", "int8_scalar", "isa", "many", "planes",
    "tiles",
)  # fmt: skip
# An instruction set: its compiler flags, and its files beside the one that has its name.
X86: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "avx2": (AVX2, ("decoder_avx2",)),
    "avx512": (AVX512, ("decoder_avx512",)),
    "avx512_bf16": ((*AVX512, "-mavx512bf16"), ("gram_bf16",)),
    "many_bf16": ((*AVX512, "-mavx512bf16", "-mavx512vbmi"), ()),
    "many_int8": ((*AVX512, "-mavx512vnni", "-mavx512vbmi"), ()),
    "tiles_bf16": ((*AVX512, "-mavx512bf16", "-mavx512vbmi", "-mamx-tile", "-mamx-bf16"), ()),
    "tiles_int8": ((*AVX512, "-mavx512vnni", "-mavx512vbmi", "-mamx-tile", "-mamx-int8"), ("encoder_amx",)),
    "int8_avx2": (AVX2, ()),
    "int8_avx512": ((*AVX512, "-mavx512vnni", "-mavx512vbmi"), ("int8_bytes",)),
    "planes_avx512": ((*AVX512, "-mavx512vnni", "-mavx512vbmi"), ()),
}


def source_hash() -> str:
    """What the sources and their flags are; a library built from others is not used."""
    digest = hashlib.sha256(repr((FLAGS, X86)).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def is_current(library: Path = LIBRARY) -> bool:
    """Whether there is a library that this machine can load, built from the sources as they are."""
    try:
        handle = ctypes.CDLL(str(library))
    except OSError:
        return False
    handle.whit_sources.restype = ctypes.c_char_p
    return bool(handle.whit_sources().decode() == source_hash())


def find_compiler() -> str | None:
    """The first C++ compiler on the path."""
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def build(target: Path = LIBRARY, compiler: str | None = None, extra: Sequence[str] = ()) -> list[str]:
    """Write the library to `target`, atomically; the names of the instruction sets that were left out.

    Raises RuntimeError, with the compiler's own words, where there is no compiler or it fails.
    """
    compiler = compiler or find_compiler()
    if compiler is None:
        raise RuntimeError(f"no C++ compiler ({', '.join(COMPILERS)}) is on the path")
    if sys.platform == "win32":
        raise RuntimeError("the kernels are not built on Windows")
    optional = X86 if platform.machine().lower() in ("x86_64", "amd64") else {}
    with tempfile.TemporaryDirectory(dir=target.parent) as folder, ThreadPoolExecutor() as pool:

        def compiled(name: str, flags: Sequence[str]) -> tuple[Path, str]:
            out = Path(folder) / f"{name}.o"
            return out, _run([compiler, *FLAGS, *flags, *extra, "-c", str(SOURCES / f"{name}.cpp"), "-o", str(out)])

        scalar = pool.submit(compiled, "scalar", ())
        jobs = {
            isa: [pool.submit(compiled, name, flags) for name in (isa, *files)]
            for isa, (flags, files) in optional.items()
        }
        objects = {isa: [job.result() for job in files] for isa, files in jobs.items()}
        have = [isa for isa, files in objects.items() if not any(error for _, error in files)]
        defines = [f'-DWHIT_SOURCES="{source_hash()}"', *(f"-DWHIT_HAVE_{isa.upper()}" for isa in have)]
        needed = [scalar.result(), *pool.map(lambda name: compiled(name, defines), BASE)]
        library = Path(folder) / target.name
        files = [str(out) for out, _ in [*needed, *(made for isa in have for made in objects[isa])]]
        error = next((error for _, error in needed if error), "")
        error = error or _run([compiler, "-shared", *extra, "-o", str(library), *files])
        if error:
            raise RuntimeError(f"{compiler} failed: {error}")
        library.replace(target)
    return [name for name in optional if name not in have]


def _run(command: Sequence[str]) -> str:
    """Empty if the command succeeds, otherwise the last lines that it wrote."""
    done = subprocess.run(command, capture_output=True, text=True)
    return "" if done.returncode == 0 else (done.stderr.strip() or f"exit status {done.returncode}")[-2000:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=LIBRARY)
    parser.add_argument("--compiler")
    parser.add_argument("--sanitize", action="store_true", help="with the address and undefined-behaviour sanitizers")
    args = parser.parse_args()
    try:
        left_out = build(args.output, args.compiler, SANITIZERS if args.sanitize else ())
    except RuntimeError as error:
        sys.exit(f"the CPU kernels were not built: {error}")
    print(f"built {args.output}" + (f"; left out: {', '.join(left_out)}" if left_out else ""))


if __name__ == "__main__":
    main()
