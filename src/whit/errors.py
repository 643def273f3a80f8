"""The few kinds of error that whit raises.

Every message is one sentence: *where: what is; what must be; what to do.* The command line prints it on
standard error without a traceback and exits with the error's `exit_status`.
"""

from __future__ import annotations


class WhitError(Exception):
    """Anything that whit refuses to do, said in one sentence."""

    exit_status = 1


class WhitWarning(UserWarning):
    """Something that goes on otherwise than a user would expect, in one sentence; the command line prints it alone."""


class FormatError(WhitError):
    """A format that does not exist, or a tensor that the format cannot hold."""


class NonFiniteError(FormatError):
    """A NaN or an infinity in a tensor that should be quantized."""


class CheckpointError(WhitError):
    """A model folder or file that is missing, damaged, hostile or incomplete."""


class OutputError(WhitError):
    """An output place that cannot be used: it exists, lies inside the model, or the disk is full."""


class DeviceError(WhitError):
    """A device that has no such name, or that this machine lacks."""


class RecipeError(WhitError):
    """A recipe that contradicts itself or does not fit the model."""


class UnsupportedModelError(WhitError):
    """An architecture that transformers does not know, or whose linears cannot be accounted for."""


class CalibrationError(WhitError):
    """A calibration text that cannot be used, or a linear whose inputs were not seen."""


class KernelError(WhitError):
    """No kernel can run a packed weight where it lies."""


class PackedWeightError(WhitError, RuntimeError):
    """Arithmetic with the empty `weight` of a packed module, or a product with inputs of another width.

    A RuntimeError, as torch's about shapes is.
    """


class EvaluationError(WhitError):
    """A text or a task that cannot be scored."""


class QualityGateError(WhitError):
    """The result was written and measured, and is worse than the user allowed."""

    exit_status = 3


class TrainingError(WhitError):
    """Training data that cannot be used, settings that contradict each other, or a loss that is not a number."""


LONGEST = 300  # characters of what another library says


def reason_of(error: BaseException) -> str:
    """What another library's exception says, as a part of a sentence: its first line, and the next after a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return said[:LONGEST].rstrip(".: ")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, a GPU's, or, told by its words alone, torch's on a CPU."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's; it is not imported
    return known or any(words in str(error) for words in ("allocate memory", "tried to allocate"))
