"""ONNX files of decoders for ONNX Runtime and onnxruntime-genai, in MatMulNBits."""

from __future__ import annotations

from whit.export.onnx.exporter import Onnx

__all__ = ["Onnx"]
