"""Files of weights: safetensors folders checked and read tensor by tensor, and written so, resumed after a kill.

`header`, `gguf` and `onnx` read headers with suspicion, `reader` and `writer` the tensors behind them; `work` is the
folder in which a result grows, `files` what lies beside the weights, `hub` the way from a name to a folder.
"""
