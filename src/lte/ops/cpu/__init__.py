"""C++ kernels for the CPU (sources in ``csrc/``), called through ctypes."""

from lte.ops.cpu.calls import (
    PreparedCall,
    copied_ffn,
    copy_scores,
    dequantize,
    linear,
    nested_ffn,
    quantize,
    quantized_ffn,
    quantized_linear,
    read_seconds,
    sparse_ffn,
)
from lte.ops.cpu.library import DTYPES, instruction_set, kernels, unavailable

__all__ = [
    "DTYPES",
    "PreparedCall",
    "copied_ffn",
    "copy_scores",
    "dequantize",
    "instruction_set",
    "kernels",
    "linear",
    "nested_ffn",
    "quantize",
    "quantized_ffn",
    "quantized_linear",
    "read_seconds",
    "sparse_ffn",
    "unavailable",
]
