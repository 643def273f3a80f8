"""`whit doctor`: what this machine has."""

from __future__ import annotations

import torch

import whit


def doctor() -> None:
    """Say what this machine has: versions, devices, kernels, and why one is not used."""
    print(f"whit {whit.__version__}, torch {torch.__version__}")
