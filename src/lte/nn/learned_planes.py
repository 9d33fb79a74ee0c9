"""An FFN in two planes of bits whose scales are being learned; see :func:`lte.tune_quantized`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte.nn.ffn import SparseFFN
from lte.nn.nested import NestedDown, NestedLinear
from lte.nn.quantized import ScaledCodes
from lte.nn.routing import NestedForm
from lte.ops import ACTIVATIONS, LowBitMatrix
from lte.ops.lowbit import scales_in_blocks
from lte.ops.nested import RowCodes


class LearnedPlanes:
    """Stands in for an FFN's forward: what :func:`lte.ops.nested.nested_ffn_reference` computes, with a gradient for a
    factor on every scale, and inputs that are not rounded. Both planes of a group have one factor.

    Args:
        ffn: in two planes, whose thresholds stay as they are.
    """

    def __init__(self, ffn: SparseFFN) -> None:
        form = ffn.router.form()
        assert isinstance(form, NestedForm)
        self.ffn, self.form = ffn, form
        weights, copy = form.weights, form.weights.copy
        self.act = ACTIVATIONS[weights.activation]
        self.up = _Planes.of_tiles(copy.up, weights.up_lower)
        self.gate = None if copy.gate is None else _Planes.of_tiles(copy.gate, weights.gate_lower)
        down = weights.down
        self.down = _Planes(down.upper.codes(), down.upper.bits, down.lower, down.scales.float(), down.group)

    def parameters(self) -> list[nn.Parameter]:
        """The factors, [rows, groups] each."""
        return [planes.factors for planes in (self.up, self.gate, self.down) if planes is not None]

    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        weights = self.form.weights
        coarse = self._hidden(x, exact=False)
        scores = coarse.detach().float().abs() * weights.copy.norms
        on = (scores > self.form.cut) | (self.form.cut < 0)
        fine = on & ((scores > self.form.fine_cut) | (self.form.fine_cut < 0))
        hidden = torch.where(fine, self._hidden(x, exact=True), coarse) * on
        y = F.linear(hidden * ~fine, self._down(exact=False).T) + F.linear(hidden * fine, self._down(exact=True).T)
        return y if weights.down_bias is None else y + weights.down_bias

    def _hidden(self, x: Tensor, *, exact: bool) -> Tensor:
        weights = self.form.weights
        up = F.linear(x, self.up.numbers(exact=exact).to(x.dtype), weights.up_bias)
        if self.gate is None:
            return self.act(up)
        return self.act(F.linear(x, self.gate.numbers(exact=exact).to(x.dtype), weights.gate_bias)) * up

    def _down(self, *, exact: bool) -> Tensor:
        """[F, D], with the rows that were not rounded."""
        down, numbers = self.form.weights.down, self.down.numbers(exact=exact)
        return numbers.index_copy(0, down.exact.long(), down.exact_rows.to(numbers.dtype))

    @torch.no_grad()
    def fix(self) -> None:
        """Make what was learned part of the scales, rounded to bfloat16."""
        roles = self.ffn.roles
        for role, planes in (("up", self.up), ("gate", self.gate)):
            if planes is not None:
                module = self.ffn.get_submodule(roles[role])
                assert isinstance(module, NestedLinear)
                module.scales = scales_in_blocks(planes.scales * planes.factors, by_columns=False).view(torch.int16)
        down = self.ffn.get_submodule(roles["down"])
        assert isinstance(down, NestedDown)
        down.scales = (self.down.scales * self.down.factors).bfloat16().view(torch.int16)


class _Planes:
    """Codes of both planes of a matrix, [N, G, group] each, and one factor for every scale."""

    def __init__(self, upper_ND: Tensor, bits: int, lower: RowCodes | None, scales_NG: Tensor, group: int) -> None:
        low = 0 if lower is None else lower.bits
        self.columns, self.bits, self.low, self.scales = upper_ND.shape[1], bits, low, scales_NG
        fill = (0, -self.columns % group)
        self.upper = F.pad(upper_ND, fill).unflatten(1, (-1, group))
        self.all = self.upper
        if lower is not None:
            self.all = F.pad((upper_ND << low) | lower.codes(), fill).unflatten(1, (-1, group))
        self.factors = nn.Parameter(torch.ones_like(scales_NG))

    @classmethod
    def of_tiles(cls, upper: LowBitMatrix, lower: RowCodes | None) -> _Planes:
        codes = upper.codes().flatten(1)[:, : upper.columns]
        return cls(codes, upper.bits, lower, upper.scales_of_rows().float(), upper.group)

    def numbers(self, *, exact: bool) -> Tensor:
        """[N, columns] float32."""
        low = self.low if exact else 0
        codes, scales = (self.all if exact else self.upper), self.scales * 2.0**-low
        made: Tensor = ScaledCodes.apply(self.factors, codes, scales, (2 ** (self.bits + low) - 1) / 2)
        return made[:, : self.columns]
