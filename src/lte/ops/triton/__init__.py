"""The sparse FFN on the GPU, in Triton. Import it lazily: it needs the ``triton`` package."""

from lte.ops.triton.autotune import autotune
from lte.ops.triton.launch import copy_scores, routed_ffn, sparse_ffn

__all__ = ["autotune", "copy_scores", "routed_ffn", "sparse_ffn"]
