"""The sparse FFN operator. Knows tensors only, nothing of models."""

from lte.ops.reference import ACTIVATIONS, scale_experts, sparse_ffn_reference
from lte.ops.weights import FFNWeights

__all__ = ["ACTIVATIONS", "FFNWeights", "scale_experts", "sparse_ffn_reference"]
