"""What other libraries say on their own is kept off the terminal, errors aside."""

from __future__ import annotations

import logging as standard
import warnings


def quiet_transformers() -> None:
    """No progress bars and no warnings of transformers; what matters of them whit says itself.

    Nor what it says is to be renamed in its next version, or what bitsandbytes, which PEFT imports, looks for.
    """
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    standard.getLogger("bitsandbytes").setLevel(standard.ERROR)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
