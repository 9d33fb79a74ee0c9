"""C++ kernels for the CPU (sources in ``csrc/``), called through ctypes."""

from lte.ops.cpu.calls import Plan, linear, read_seconds, sparse_ffn
from lte.ops.cpu.library import DTYPES, instruction_set, kernels, unavailable

__all__ = ["DTYPES", "Plan", "instruction_set", "kernels", "linear", "read_seconds", "sparse_ffn", "unavailable"]
