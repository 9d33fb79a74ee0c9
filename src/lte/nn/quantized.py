"""Linear layers and embeddings whose weights are of few bits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte.ops import quantized_linear
from lte.ops.lowbit import COLUMNS, ROWS, LowBitMatrix, dequantize_rows, scales_in_blocks

FEW_TOKENS = 64
"""Up to so many tokens the kernels read the codes; the numbers that are meant are written out for more."""


class QuantizedWeight(nn.Module):
    """Holds a :class:`LowBitMatrix` as two buffers, ``codes`` and ``scales``, that no cast changes.

    Args:
        rows, columns: of the matrix.
        bits: of a code.
        group: weights that share a scale.
        by_columns: how the tiles lie.
        device: of the buffers, which hold nothing yet.
    """

    codes: Tensor
    scales: Tensor

    def __init__(
        self,
        rows: int,
        columns: int,
        *,
        bits: int,
        group: int,
        by_columns: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.rows, self.columns, self.bits, self.group, self.by_columns = rows, columns, bits, group, by_columns
        blocks, groups, chunks = -(-rows // ROWS), -(-columns // group), group // COLUMNS
        order = (groups, chunks, blocks) if by_columns else (blocks, groups, chunks)
        self.register_buffer("codes", torch.empty((*order, bits, 4 * ROWS), dtype=torch.uint8, device=device))
        shape = (groups, blocks, ROWS) if by_columns else (blocks, groups, ROWS)
        # As integers, so that no cast of the model rounds them.
        self.register_buffer("scales", torch.empty(shape, dtype=torch.int16, device=device))

    spared = 0
    """Bytes of bits that are not always read."""

    def hold(self, matrix: LowBitMatrix) -> None:
        """Take over a matrix of these sizes."""
        self.codes, self.scales = matrix.planes, matrix.scales.view(torch.int16)

    @property
    def matrix(self) -> LowBitMatrix:
        """What is held."""
        return LowBitMatrix(self.codes, self.scales.view(torch.bfloat16), self.rows, self.columns, self.by_columns)

    def numel(self) -> int:
        """Number of weights."""
        return self.rows * self.columns

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        return self.matrix.nbytes

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{self.columns}, {self.rows}, bits={self.bits}, group={self.group}"


class QuantizedLinear(QuantizedWeight):
    """``nn.Linear`` of few bits; its codes take no gradient, and pass those of the inputs on.

    Args:
        in_features, out_features: D and N.
        bias: whether there is one.
        **storage: ``bits``, ``group``, ``by_columns`` and ``device`` of :class:`QuantizedWeight`.
    """

    factors: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False, **storage: Any) -> None:
        super().__init__(out_features, in_features, **storage)
        self.in_features, self.out_features = in_features, out_features
        bias_N = torch.empty(out_features, device=storage.get("device"), dtype=torch.get_default_dtype())
        self.bias = nn.Parameter(bias_N) if bias else None
        self.register_parameter("factors", None)

    @property
    def weight(self) -> Tensor:
        """[N, D], written out at every access."""
        return self.matrix.dequantize(torch.float32 if self.bias is None else self.bias.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., N]."""
        if self.factors is not None:
            return F.linear(x, self._learned_weight().to(x.dtype), self.bias)
        return _product(x, self.matrix, self.bias)

    def learn_scales(self) -> nn.Parameter:
        """From now on multiply every scale with a factor that is learned, [N, G] of ones, until :meth:`fix_scales`."""
        scales = self.matrix.scales_of_rows().float()
        self.factors = nn.Parameter(torch.ones_like(scales))
        self._codes_of_rows = self.matrix.codes(), scales
        return self.factors

    @torch.no_grad()
    def fix_scales(self) -> None:
        """Make what was learned part of the scales, rounded to bfloat16."""
        assert self.factors is not None
        learned = scales_in_blocks(self._codes_of_rows[1] * self.factors, by_columns=self.by_columns)
        self.factors = None
        del self._codes_of_rows
        self.scales = learned.view(torch.int16)

    def _learned_weight(self) -> Tensor:
        codes, scales = self._codes_of_rows
        made: Tensor = ScaledCodes.apply(self.factors, codes, scales, (2**self.bits - 1) / 2)
        return made[:, : self.columns]


class QuantizedEmbedding(QuantizedWeight):
    """``nn.Embedding`` of few bits, not learned.

    Args:
        num_embeddings, embedding_dim: V and D.
        scale: what comes out is multiplied by, as Gemma does.
        dtype: of what comes out; torch's default one if None.
        **storage: as of :class:`QuantizedLinear`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        scale: float = 1.0,
        dtype: torch.dtype | None = None,
        **storage: Any,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, **storage)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        # The first parameter of a model says what its dtype is.
        factor = torch.full((), scale, dtype=dtype, device=storage.get("device"))
        self.scale = nn.Parameter(factor, requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., D]."""
        return dequantize_rows(self.matrix, ids, self.scale.dtype) * self.scale


class TiedHead(nn.Module):
    """A language model's head that multiplies with the rows of a :class:`QuantizedEmbedding`.

    Args:
        embedding: holds the weights; no child of this module, so that they are saved once.
    """

    def __init__(self, embedding: QuantizedEmbedding) -> None:
        super().__init__()
        self._embedding = [embedding]
        self.bias = None

    @property
    def matrix(self) -> LowBitMatrix:
        """[V, D]."""
        return self._embedding[0].matrix

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        return _product(x, self.matrix, None)


class ScaledCodes(torch.autograd.Function):
    """``factor * scale * (code - middle)``, which keeps no more for the gradient of the factors than bytes of codes."""

    @staticmethod
    def forward(ctx: Any, factors_NG: Tensor, codes_NGk: Tensor, scales_NG: Tensor, middle: float) -> Tensor:
        """[N, G], [N, G, k] codes, [N, G] -> [N, G k] float32."""
        ctx.save_for_backward(codes_NGk, scales_NG)
        ctx.middle = middle
        return ((codes_NGk - middle) * (factors_NG * scales_NG).unsqueeze(-1)).flatten(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Of the factors."""
        codes, scales = ctx.saved_tensors
        return ((codes - ctx.middle) * grads[0].view(codes.shape)).sum(-1) * scales, None, None, None


def _product(x: Tensor, matrix: LowBitMatrix, bias: Tensor | None) -> Tensor:
    x_TD = x.reshape(-1, matrix.columns)
    if len(x_TD) <= FEW_TOKENS and not (torch.is_grad_enabled() and x.requires_grad):
        return quantized_linear(x_TD, matrix, bias).view(*x.shape[:-1], matrix.rows)
    return F.linear(x, matrix.dequantize(x.dtype), bias)
