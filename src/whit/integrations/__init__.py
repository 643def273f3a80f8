"""Where whit meets other libraries: transformers and its Auto classes.

`config`, `quantizer` and `plan` are what `from_pretrained` calls, registered by `transformers`; `loading`, `foreign`
and `offload` bring models in, `generation` runs one, `cache` keeps its keys and values.
"""
