"""What a model is made of: which parameters can be quantized, and the modules that hold packed weights."""
