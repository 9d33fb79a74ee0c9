"""The sparse FFN operator. Knows tensors only, nothing of models."""

from lte.ops.backends import SMALL_BATCH
from lte.ops.backends import obstacle as backend_obstacle
from lte.ops.backends import requested as requested_backend
from lte.ops.cpu import instruction_set as cpu_instruction_set
from lte.ops.lowbit import FFNCopy, LowBitMatrix
from lte.ops.operator import copied_ffn, linear, route, routed_ffn, runs_copies, sparse_ffn
from lte.ops.reference import ACTIVATIONS, project_down, scale_experts, sparse_ffn_reference
from lte.ops.weights import FFNWeights

__all__ = [
    "ACTIVATIONS",
    "SMALL_BATCH",
    "FFNCopy",
    "FFNWeights",
    "LowBitMatrix",
    "backend_obstacle",
    "copied_ffn",
    "cpu_instruction_set",
    "linear",
    "project_down",
    "requested_backend",
    "route",
    "routed_ffn",
    "runs_copies",
    "scale_experts",
    "sparse_ffn",
    "sparse_ffn_reference",
]
