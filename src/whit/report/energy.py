"""Energy counters: NVML's on an NVIDIA GPU, RAPL's on a processor where the kernel lets it be read; else none.

Both count everything that their device does, whoever asked for it. Nothing is ever estimated.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

RAPL = Path("/sys/class/powercap")


class Meter:
    """`read` gives joules since some moment, or None; `note` says which counter it is, or why there is none."""

    def __init__(self, device: torch.device, rapl: Path = RAPL) -> None:
        self._nvml: ctypes.CDLL | None = None
        self._handle = ctypes.c_void_p()
        self._packages: list[Path] = []
        self.note = self._open_nvml(device) if device.type == "cuda" else self._open_rapl(rapl)

    def read(self) -> float | None:
        """Joules."""
        if self._nvml is not None:
            value = ctypes.c_ulonglong()
            status = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.byref(value))
            return None if status else value.value / 1000.0  # millijoules
        if self._packages:
            return sum(int(path.read_text()) for path in self._packages) / 1e6  # microjoules
        return None

    def _open_nvml(self, device: torch.device) -> str:
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return "not measurable here: NVML is not installed"
        index = device.index if device.index is not None else torch.cuda.current_device()
        identity = f"GPU-{torch.cuda.get_device_properties(index).uuid}".encode()
        value = ctypes.c_ulonglong()
        failed = library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(identity, ctypes.byref(self._handle))
        if failed or library.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.byref(value)):
            return "not measurable here: NVML gives no energy counter for this GPU"
        self._nvml = library
        return "NVML's counter of the whole GPU"

    def _open_rapl(self, folder: Path) -> str:
        found = sorted(folder.glob("intel-rapl:[0-9]*/energy_uj"))
        packages = [path for path in found if path.parent.name.count(":") == 1]
        if not packages:
            return "not measurable here: the kernel shows no RAPL counter"
        try:
            for path in packages:
                path.read_text()
        except OSError:
            return "not measurable here: RAPL's counters are readable by root alone"
        self._packages = packages
        return "RAPL's counters of all processor packages"
