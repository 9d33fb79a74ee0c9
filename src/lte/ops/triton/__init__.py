"""The sparse FFN on the GPU, in Triton. Import it lazily: it needs the ``triton`` package."""

from lte.ops.triton.autotune import autotune
from lte.ops.triton.launch import copy_scores, routed_ffn, sparse_ffn
from lte.ops.triton.nested import nested_ffn
from lte.ops.triton.quantized import quantized_ffn, quantized_linear

__all__ = ["autotune", "copy_scores", "nested_ffn", "quantized_ffn", "quantized_linear", "routed_ffn", "sparse_ffn"]
