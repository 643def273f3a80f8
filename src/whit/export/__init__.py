"""How a file names a quantized model."""
