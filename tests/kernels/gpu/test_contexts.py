"""The driver is asked where a kernel's device is current, also from threads and beside devices that have none."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from whit.errors import KernelError
from whit.kernels.gpu import nvrtc


class Machine:
    """Two devices and one thread, whose current device and context are known, and a kernel that wants them right."""

    def __init__(self) -> None:
        self.device, self.context, self.ran = 0, -1, []  # -1: nothing of CUDA has run in this thread

    def current(self, device: Any) -> Machine:
        self.before = self.device
        self.index = device
        return self

    def __enter__(self) -> None:
        self.device = self.context = self.index  # cudaSetDevice makes a context current

    def __exit__(self, *_: object) -> None:
        self.device = self.context = self.before

    def retain(self, context: Any, device: int) -> int:
        ctypes.c_void_p.from_address(ctypes.addressof(context._obj)).value = 1 + device
        return 0

    def set(self, context: ctypes.c_void_p) -> int:
        self.context = (context.value or 0) - 1
        return 0

    def kernel(self, wanted: int) -> int:
        if self.context != wanted:
            return nvrtc.NO_CONTEXT if self.context < 0 else 400
        self.ran.append(wanted)
        return 0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine()
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: found.device, raising=False)
    monkeypatch.setattr(torch.cuda, "device", found.current)
    calls = SimpleNamespace(cuDevicePrimaryCtxRetain=found.retain, cuCtxSetCurrent=found.set, launch=found.kernel)
    monkeypatch.setattr(nvrtc, "driver", lambda: calls)
    return found


def test_a_thread_without_a_context_gets_the_devices(machine: Machine):
    assert nvrtc.on_device(0, lambda: machine.kernel(0)) == 0
    assert machine.ran == [0]
    assert machine.context == 0  # and keeps it


def test_another_device_is_current_only_meanwhile(machine: Machine):
    machine.context = 0
    assert nvrtc.on_device(1, lambda: machine.kernel(1)) == 0
    assert machine.ran == [1]
    assert (machine.device, machine.context) == (0, 0)


def test_a_kernel_says_what_the_driver_reports(machine: Machine):
    machine.context = 0
    function = nvrtc.Function.__new__(nvrtc.Function)
    function.name, function.device = "many", 0
    function.call("launch", 0)
    assert machine.ran == [0]
    with pytest.raises(KernelError, match="many: CUDA error 400"):
        function.call("launch", 1)
