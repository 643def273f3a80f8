"""What other libraries say on their own is kept off the terminal, errors aside."""

from __future__ import annotations


def quiet_transformers() -> None:
    """No progress bars and no warnings of transformers; what matters of them whit says itself."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
