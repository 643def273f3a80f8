"""What formats share that stand around another one and leave its codes as they are: a side-car, a rotation."""

from __future__ import annotations

from typing import Any

from whit.tensor import Format


class Around:
    """Adds no field: a subclass has the format `base`."""

    base: Format

    product_dtype = None  # w is not codes times a scale: nothing for products of quantized activations
    in_bytes = None

    def __getattr__(self, name: str) -> Any:
        """What is said of codes is the base's: bits, group_size, code_min, searches and so on."""
        if name == "base" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.base, name)
