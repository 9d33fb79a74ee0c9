"""C++ kernels for the CPU (sources in ``csrc/``), called through ctypes."""

from lte.ops.cpu.calls import linear, read_seconds, sparse_ffn
from lte.ops.cpu.library import DTYPES, instruction_set, kernels, unavailable

__all__ = ["DTYPES", "instruction_set", "kernels", "linear", "read_seconds", "sparse_ffn", "unavailable"]
