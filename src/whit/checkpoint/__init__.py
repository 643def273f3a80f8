"""Safetensors folders: checked and read tensor by tensor, written tensor by tensor, resumed after a kill."""
