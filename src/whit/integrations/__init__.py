"""Where whit meets other libraries: transformers and its Auto classes."""
