"""What other libraries say on their own is kept off the terminal, errors aside."""

from __future__ import annotations

import logging as standard
import warnings
from functools import partialmethod
from typing import Any

from whit.cli.console import say
from whit.errors import WhitWarning


def bars_on_terminals_alone() -> None:
    """tqdm's bars, whoever draws them, appear where standard error is a terminal; a log file gets none.

    transformers draws one over a .gguf file's tensors, and others, that its own switch does not reach.
    """
    from tqdm.std import tqdm

    if isinstance(vars(tqdm)["__init__"], partialmethod):  # done before in this process
        return
    tqdm.__init__ = partialmethod(tqdm.__init__, disable=None)  # None: unless it is a terminal


def warnings_in_a_line() -> None:
    """whit's own warnings appear as sentences, without the place in the source that other warnings come with."""
    usual = warnings.showwarning
    if usual.__name__ == "show_in_a_line":  # done before in this process
        return

    def show_in_a_line(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, WhitWarning):
            say(str(message))
        else:
            usual(message, category, *place, **more)

    warnings.showwarning = show_in_a_line


def quiet_transformers() -> None:
    """No progress bars and no warnings of transformers; what matters of them whit says itself.

    Nor what it says is to be renamed in its next version, or what bitsandbytes, which PEFT imports, looks for.
    """
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    standard.getLogger("bitsandbytes").setLevel(standard.ERROR)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
