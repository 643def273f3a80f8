"""What a process says of itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="elsewhere the system's figure is all there is")
def test_the_peak_is_not_that_of_the_process_that_began_this_one():
    ballast = bytearray(1_200_000_000)
    said = subprocess.check_output([sys.executable, "-c", "from whit.process import peak_memory; print(peak_memory())"])
    assert 0 < int(said) < len(ballast)
