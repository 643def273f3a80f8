"""whit: quantize any Hugging Face transformer, run it, and measure what was given up."""

__version__ = "0.1.0"
