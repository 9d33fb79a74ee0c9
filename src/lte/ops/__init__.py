"""The sparse FFN operator. Knows tensors only, nothing of models."""

from lte.ops.backends import SMALL_BATCH
from lte.ops.backends import obstacle as backend_obstacle
from lte.ops.backends import requested as requested_backend
from lte.ops.cpu import instruction_set as cpu_instruction_set
from lte.ops.few_bits import nested_ffn, quantized_ffn, quantized_linear
from lte.ops.lowbit import FFNCopy, LowBitMatrix
from lte.ops.nested import NestedFFN
from lte.ops.operator import (
    copied_ffn,
    copies_run,
    copy_scores,
    copy_scores_run,
    fast_linear,
    linear,
    route,
    routed_ffn,
    sparse_ffn,
)
from lte.ops.quantized import QuantizedFFN
from lte.ops.reference import ACTIVATIONS, copy_scores_reference, project_down, scale_experts, sparse_ffn_reference
from lte.ops.weights import FFNWeights

__all__ = [
    "ACTIVATIONS",
    "SMALL_BATCH",
    "FFNCopy",
    "FFNWeights",
    "LowBitMatrix",
    "NestedFFN",
    "QuantizedFFN",
    "backend_obstacle",
    "copied_ffn",
    "copies_run",
    "copy_scores",
    "copy_scores_reference",
    "copy_scores_run",
    "cpu_instruction_set",
    "fast_linear",
    "linear",
    "nested_ffn",
    "project_down",
    "quantized_ffn",
    "quantized_linear",
    "requested_backend",
    "route",
    "routed_ffn",
    "scale_experts",
    "sparse_ffn",
    "sparse_ffn_reference",
]
