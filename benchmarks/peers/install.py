"""Install every peer from PyPI: python benchmarks/peers/install.py DIR [--python python3.12] [--peers kernels]

Each peer gets a folder of its own below DIR, which `run.py` puts before its imports: an environment of its own over
this interpreter's torch and transformers. Versions are pinned, dependencies are named (an open resolve would bring
gigabytes of another torch). With --python the folders are for another interpreter, to be carried to a machine that
cannot install. What does not install is named with its error; the others go on.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PINS = {
    "gptqmodel": (
        "gptqmodel==7.7.0", "device-smi==0.5.7", "logbar==0.4.15", "pypcre==0.6.4", "defuser==0.0.28",
        "tokenicer==0.0.14", "threadpoolctl==3.8.0", "dill==0.4.1", "protobuf==7.36.2",
    ),
    "llmcompressor": ("llmcompressor==0.14.0.1", "compressed-tensors==0.19.0", "auto-round==0.15.1", "loguru==0.7.3"),
    "autoround": ("auto-round==0.16.1", "py-cpuinfo==9.0.0"),
    "onnxruntime": (
        "onnxruntime==1.31.1", "onnx==1.23.2", "ml-dtypes==0.6.0", "protobuf==7.36.2",
        "flatbuffers==25.12.19",
    ),
    "hqq": ("hqq==0.2.8.post1", "einops", "termcolor"),
    # Products alone, for cpu_kernels.py. ggml-python compiles ggml for this processor (a few minutes).
    "openvino": ("openvino==2026.4.1", "openvino-telemetry==2025.2.0"),
    "auto-round-lib": ("auto-round-lib==0.16.0",),
    "torchao": ("torchao==0.18.0",),
    "ggml": ("ggml-python==0.0.45",),
}  # fmt: skip
GROUPS = {"kernels": ("onnxruntime", "openvino", "auto-round-lib", "torchao", "ggml")}
# What transformers does not need and these do; for an interpreter that lacks them.
SHARED = (
    "datasets==5.2.0", "dill==0.4.1", "multiprocess==0.70.19", "httpx<1", "pydantic==2.14.3", "pydantic-core==2.50.4",
    "annotated-types", "typing-inspection", "typing-extensions==4.16.0",
)  # fmt: skip
NEED_TORCH = ("gptqmodel", "hqq")  # their builds import it; what they build is pure Python


def pip(python: str, *arguments: str) -> None:
    """Run pip; what it calls an error is the error."""
    command = [python, "-m", "pip", "wheel", *arguments, "-q", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        raise RuntimeError(said[0] if said else done.stderr[-300:])


def wheels(packages: tuple[str, ...], place: Path, python: str) -> None:
    """Wheels of the packages, for that interpreter."""
    built = [p for p in packages if p.split("==")[0] in NEED_TORCH]
    found = [p for p in packages if p not in built]
    if built:
        pip(sys.executable, "--no-build-isolation", "-w", str(place), *built)
    if found:
        pip(python, "-w", str(place), *found)


def install(name: str, packages: tuple[str, ...], target: Path, python: str) -> str:
    """One environment; returns what to say of it."""
    if target.exists():
        return f"{name}: already in {target}"
    with tempfile.TemporaryDirectory() as scratch:
        try:
            wheels(packages, Path(scratch), python)
        except RuntimeError as error:
            return f"{name}: {error}"
        part = target.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        for wheel in sorted(Path(scratch).glob("*.whl")):
            shutil.unpack_archive(wheel, part, "zip")
        for unused in ("tests", "bin"):
            shutil.rmtree(part / unused, ignore_errors=True)
        part.rename(target)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    return f"{name}: {', '.join(packages)}; {size / 1e6:.1f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default=sys.executable, help="the interpreter that will run them")
    parser.add_argument("--peers", default=",".join(PINS))
    parser.add_argument("--shared", action="store_true", help="also what a bare interpreter lacks")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in (one for named in args.peers.split(",") for one in GROUPS.get(named, (named,))):
        print(install(name, PINS[name], args.folder / name, args.python), flush=True)
    if args.shared:
        print(install("shared", SHARED, args.folder / "shared", args.python), flush=True)


if __name__ == "__main__":
    main()
