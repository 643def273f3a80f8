"""CUDA C++ compiled at run time: source to machine code with NVRTC, loaded and launched through the driver.

torch brings NVRTC along and the driver is there wherever CUDA works, so nothing is built at install. A kernel takes one
struct by value.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import torch

from whit.errors import KernelError

COMMON = Path(__file__).with_name("common.cuh")
Dims: TypeAlias = tuple[int, int, int]
Macros: TypeAlias = tuple[tuple[str, int], ...]
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
CLUSTER = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
EARLY = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
FREE_SHARED = 48 * 1024  # more must be asked for
NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT


@lru_cache(maxsize=1)
def compiler() -> ctypes.CDLL:
    """libnvrtc of torch's CUDA version; OSError where there is none."""
    major = (torch.version.cuda or "12").split(".")[0]
    name = f"libnvrtc.so.{major}"
    folders = [Path(torch.__file__).parent / "lib", *Path(torch.__file__).parent.parent.glob("nvidia/*/lib")]
    found = [str(folder / name) for folder in folders if (folder / name).exists()]
    for candidate in [*found, name, "libnvrtc.so"]:
        try:
            for builtins in Path(candidate).parent.glob("libnvrtc-builtins.so*"):  # which it looks for by bare name
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    raise OSError(f"{name} is neither beside torch nor on the library path")


@lru_cache(maxsize=1)
def driver() -> ctypes.CDLL:
    """The CUDA driver's library."""
    return ctypes.CDLL("libcuda.so.1")


def stream_on(device: int) -> int:
    """The address of torch's current stream on a device, without the object that torch makes of it."""
    address: int = torch._C._cuda_getCurrentRawStream(device)
    return address


def on_device(device: int, call: Callable[[], int]) -> int:
    """The driver's answer to `call` where a device's primary context is current, as torch's own kernels find it.

    Models over several devices run with another one current; and threads in which nothing of CUDA has run yet, such as
    those of torch's autograd, have none.
    """
    if torch._C._cuda_getDevice() != device:
        with torch.cuda.device(device):
            return on_device(device, call)
    status = call()
    if status != NO_CONTEXT:
        return status
    context = ctypes.c_void_p()
    checked(driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "context")  # which torch never gives up
    checked(driver().cuCtxSetCurrent(context), "context")
    return call()


@lru_cache(maxsize=32)
def processors(device: int) -> int:
    """The multiprocessors of a device."""
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    try:
        compiler(), driver()
    except OSError as error:
        return str(error)
    return None


def compile_source(source: str, options: Sequence[str], architecture: str) -> bytes:
    """Machine code for `architecture` (sm_90); KernelError with the compiler's own words where it fails."""
    nvrtc = compiler()
    program = ctypes.c_void_p()
    checked(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None), source)
    flags = [f"--gpu-architecture={architecture}", "--std=c++17", "--disable-warnings", *options]
    array = (ctypes.c_char_p * len(flags))(*[flag.encode() for flag in flags])
    try:
        if nvrtc.nvrtcCompileProgram(program, len(flags), array):
            log = _bytes(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
            raise KernelError(
                f"gpu kernel: NVRTC refused it with {' '.join(flags)}; report this: {log.decode()[:2000]}"
            )
        return _bytes(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def text(source: Path) -> str:
    """A kernel's source after common.cuh, with the files that it includes."""
    return "\n".join([COMMON.read_text(), *_lines(source)])


def _lines(source: Path) -> Iterator[str]:
    for line in source.read_text().splitlines():
        if line.startswith('#include "'):
            yield from _lines(source.with_name(line.split('"')[1]))
        else:
            yield line


def architecture(device: int) -> str:
    """The target for a device; on Hopper with the instructions that only Hopper has."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


def build(source: Path, macros: Mapping[str, int], device: int) -> Function:
    """The kernel of a source file, which has the file's name, after common.cuh, for a device of this machine."""
    options = [f"-D{key}={value}" for key, value in macros.items()]
    code = compile_source(text(source), options, architecture(device))
    return Function(code, source.stem, device)


@lru_cache(maxsize=1024)
def built(source: Path, macros: Macros, device: int) -> Function:
    """`build`, once for the same macros."""
    return build(source, dict(macros), device)


class Attribute(ctypes.Structure):
    """CUlaunchAttribute; its value is a union, here of integers."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_uint * 16))


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint),
    )  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A kernel, its cut, and its argument, which borrows the memory that it points to."""

    function: Function
    config: LaunchConfig
    attributes: ctypes.Array[Attribute]  # that `config` points to
    params: ctypes.Structure

    def start(self, stream: int, params: Any = None) -> None:
        """Enqueue it on a stream (its address), with another argument of the same size perhaps."""
        config = LaunchConfig.from_buffer_copy(self.config)  # other threads may start it on other streams
        config.stream = stream
        argument = (ctypes.c_void_p * 1)(ctypes.addressof(self.params if params is None else params))
        self.function.call("cuLaunchKernelEx", ctypes.byref(config), self.function.handle, argument, None)


class Function:
    """A kernel loaded into a device's context; it keeps its module for as long as the process lives."""

    def __init__(self, code: bytes, name: str, device: int) -> None:
        self.module, self.handle = ctypes.c_void_p(), ctypes.c_void_p()
        self.name, self.device, self.shared = name, device, FREE_SHARED
        self.early = torch.cuda.get_device_capability(device) >= (9, 0)  # asked once, not at every launch
        self.call("cuModuleLoadData", ctypes.byref(self.module), code)
        self.call("cuModuleGetFunction", ctypes.byref(self.handle), self.module, name.encode())

    def call(self, name: str, *arguments: Any) -> None:
        """A function of the driver, on this kernel's device; KernelError where it reports an error."""
        checked(on_device(self.device, lambda: getattr(driver(), name)(*arguments)), self.name)

    def launch(
        self, grid: Dims, threads: int, shared: int, params: ctypes.Structure, stream: int, cluster: int = 1
    ) -> None:
        """Enqueue it on a stream (its address); `shared` bytes of dynamic shared memory, blocks in such clusters."""
        self.cut(grid, threads, shared, params, cluster, early=False).start(stream)

    def launch_early(
        self, grid: Dims, threads: int, shared: int, params: ctypes.Structure, stream: int, cluster: int = 1
    ) -> None:
        """The same at once, for a kernel that waits for the one before it by itself (common.cuh), from Hopper on."""
        self.cut(grid, threads, shared, params, cluster).start(stream)

    def cut(
        self, grid: Dims, threads: int, shared: int, params: ctypes.Structure, cluster: int = 1, early: bool = True
    ) -> Launch:
        """What `launch_early`, or `launch`, enqueues; it may be enqueued again while what `params` points to lives."""
        self._reserve(shared)
        wanted: dict[int, tuple[int, ...]] = {}
        if cluster > 1:  # which older devices do not know
            wanted[CLUSTER] = (cluster, 1, 1)
        if early and self.early:
            wanted[EARLY] = (1,)
        attributes = (Attribute * len(wanted))()
        for attribute, (number, value) in zip(attributes, wanted.items(), strict=True):
            attribute.id, attribute.value[: len(value)] = number, value
        config = LaunchConfig(*grid, threads, 1, 1, shared, None, ctypes.addressof(attributes), len(wanted))
        return Launch(self, config, attributes, params)

    def _reserve(self, shared: int) -> None:
        if shared > self.shared:
            self.call("cuFuncSetAttribute", self.handle, MAX_DYNAMIC_SHARED, shared)
            self.shared = shared

    def resources(self) -> dict[str, int]:
        """Registers and bytes of local memory per thread, as the driver reports them."""
        attributes = {"registers": 4, "local_bytes": 3, "static_shared": 1}
        found = {}
        for name, number in attributes.items():
            value = ctypes.c_int()
            self.call("cuFuncGetAttribute", ctypes.byref(value), number, self.handle)
            found[name] = value.value
        return found


def checked(status: int, where: str) -> None:
    """KernelError where the driver or the compiler reports one."""
    if status:
        raise KernelError(f"gpu kernel {where[:40]}: CUDA error {status}; set CUDA_LAUNCH_BLOCKING=1 and report it")


def _bytes(size_of: Any, get: Any, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    checked(size_of(program, ctypes.byref(size)), "size")
    buffer = ctypes.create_string_buffer(size.value)
    checked(get(program, buffer), "content")
    return buffer.raw
