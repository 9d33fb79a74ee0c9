"""The projections of an FFN in two planes of bits, see :mod:`lte.ops.nested`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte.nn.quantized import QuantizedLinear, QuantizedWeight
from lte.ops.nested import PIECE, NestedMatrix, NestedRows, RowCodes


class NestedLinear(QuantizedLinear):
    """A gate or up projection whose codes are cut in two; called, it multiplies with the numbers of all bits.

    Args:
        in_features, out_features: D and F.
        bits: of a weight.
        coarse: of these, those that say which neurons are needed.
        **storage: ``bias``, ``group`` and ``device`` of :class:`QuantizedLinear`.
    """

    lower: Tensor

    def __init__(self, in_features: int, out_features: int, *, bits: int, coarse: int, **storage: Any) -> None:
        super().__init__(in_features, out_features, bits=coarse, **storage)
        _add_lower(self, out_features, in_features, bits - coarse, storage.get("device"))

    def hold_planes(self, made: NestedMatrix) -> None:
        """Take over a matrix of these sizes."""
        self.hold(made.upper)
        if made.lower is not None:
            self.lower = made.lower.data

    @property
    def planes(self) -> NestedMatrix:
        """What is held."""
        return NestedMatrix(self.matrix, _lower(self, self.columns))

    @property
    def spared(self) -> int:  # type: ignore[override]
        """Bytes of the lower bits."""
        return self.lower.nbytes

    @property
    def nbytes(self) -> int:
        """Of all bits."""
        return super().nbytes + self.lower.nbytes

    @property
    def weight(self) -> Tensor:
        """[F, D], written out at every access."""
        return self.planes.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., F]."""
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class NestedDown(QuantizedWeight):
    """A down projection of which every neuron has a row of its own, and scales.

    Args:
        in_features, out_features: F and D.
        bits, coarse, bias, group, device: as of :class:`NestedLinear`.
        exact: neurons whose rows are not rounded.
    """

    lower: Tensor
    exact: Tensor
    exact_rows: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        coarse: int,
        group: int,
        exact: int = 0,
        bias: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.rows, self.columns, self.bits, self.group, self.by_columns = out_features, in_features, coarse, group, True
        self.in_features, self.out_features = in_features, out_features
        size = in_features, _row_bytes(out_features, coarse)
        self.register_buffer("codes", torch.empty(size, dtype=torch.uint8, device=device))
        groups = -(-out_features // group)
        self.register_buffer("scales", torch.empty((in_features, groups), dtype=torch.int16, device=device))
        _add_lower(self, in_features, out_features, bits - coarse, device)
        self.register_buffer("exact", torch.empty(exact, dtype=torch.int32, device=device))
        self.register_buffer("exact_rows", torch.empty((exact, out_features), dtype=torch.int16, device=device))
        bias_D = torch.empty(out_features, device=device, dtype=torch.get_default_dtype())
        self.bias = nn.Parameter(bias_D) if bias else None

    def hold_planes(self, made: NestedRows) -> None:
        """Take over rows of these sizes."""
        self.codes, self.scales = made.upper.data, made.scales.view(torch.int16)
        self.exact, self.exact_rows = made.exact, made.exact_rows.view(torch.int16)
        if made.lower is not None:
            self.lower = made.lower.data

    @property
    def planes(self) -> NestedRows:
        """What is held."""
        upper = RowCodes(self.codes, self.rows, self.bits)
        scales, rows = (tensor.view(torch.bfloat16) for tensor in (self.scales, self.exact_rows))
        return NestedRows(upper, _lower(self, self.rows), scales, self.group, self.exact, rows)

    @property
    def spared(self) -> int:  # type: ignore[override]
        """Bytes of the lower bits."""
        return self.lower.nbytes

    @property
    def nbytes(self) -> int:
        """Of all bits, and scales."""
        return self.codes.nbytes + self.scales.nbytes + self.lower.nbytes + self.exact_rows.nbytes

    @property
    def weight(self) -> Tensor:
        """[D, F], written out at every access."""
        return self.planes.dequantize().T

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., F] -> [..., D]."""
        return F.linear(hidden, self.weight.to(hidden.dtype), self.bias)


def _row_bytes(columns: int, bits: int) -> int:
    return -(-columns // PIECE) * 8 * bits


def _add_lower(module: QuantizedWeight, rows: int, columns: int, bits: int, device: torch.device | str | None) -> None:
    """The buffer of the lower bits, of rows without bytes where there are none."""
    size = rows, _row_bytes(columns, bits)
    module.register_buffer("lower", torch.empty(size, dtype=torch.uint8, device=device))


def _lower(module: NestedLinear | NestedDown, columns: int) -> RowCodes | None:
    return RowCodes.of(module.lower, columns) if module.lower.shape[1] else None
