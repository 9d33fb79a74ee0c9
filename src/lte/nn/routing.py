"""What routers decide, what kernels are told of how, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from lte.ops.lowbit import FFNCopy
from lte.ops.nested import NestedFFN


@dataclass(frozen=True)
class Routing:
    """What a router decided.

    Attributes:
        scores: [..., E] float32, in (0, 1); of a threshold router they are measured from its threshold, so that one
            above 0.5 belongs to an expert that runs, wherever the threshold stands.
        mask: [..., E] bool, True where the expert runs in hard mode.
        margins: [..., E] float32, the scores' logits; None where no threshold decides.
        used: [..., E] float32, share of each expert's weights that is used; None where that is all or nothing.
    """

    scores: Tensor
    mask: Tensor
    margins: Tensor | None = None
    used: Tensor | None = None

    @property
    def shares(self) -> Tensor:
        """[..., E], of each expert's weights that are used."""
        return self.mask if self.used is None else self.used


@dataclass(frozen=True)
class LinearForm:
    """Experts whose ``x @ weight.T + bias`` is above ``logit(threshold)`` run: what kernels decide by themselves.

    Attributes:
        weight: [E, D].
        bias: [E], or None.
        threshold: in (0, 1).
    """

    weight: Tensor
    bias: Tensor | None
    threshold: float


@dataclass(frozen=True)
class CopyForm:
    """Experts run whose output, as a coarse copy of the FFN has it, is above a norm: the kernels run the copy.

    Attributes:
        copy: of the FFN.
        cut: the norm; negative where all run, and nobody need ask.
    """

    copy: FFNCopy
    cut: float


@dataclass(frozen=True)
class NestedForm:
    """The same of an FFN whose copy is its weights' upper bits; neurons above a second norm run on all bits.

    Attributes:
        weights: of the FFN.
        cut, fine_cut: the norms; negative where all neurons are above.
    """

    weights: NestedFFN
    cut: float
    fine_cut: float


@dataclass(frozen=True)
class ConstantForm:
    """Nothing is decided: all neurons run that the FFN has; those that no token needs are not among them any more."""


@dataclass(frozen=True)
class HalfForm:
    """One of a gated FFN's first two matrices was computed to decide, and kernels go on from there.

    Attributes:
        known: ``gate`` or ``up``.
        decide: inputs [T, D] -> [T, F]: what the known half has, the gate after its activation; 0 where a neuron does
            not run.
    """

    known: str
    decide: Callable[[Tensor], Tensor]


Form = LinearForm | CopyForm | NestedForm | ConstantForm | HalfForm


@dataclass(frozen=True)
class RouterCost:
    """What deciding takes, beyond the FFN.

    Attributes:
        multiplies: multiply-adds per token; two FLOPs each.
        bytes: read per token when tokens come one at a time.
        parameters: held beside the dense model's.
        of_ffn: whether it is a part of the FFN itself, which neurons that run need not compute or read again.
    """

    multiplies: int
    bytes: int
    parameters: int
    of_ffn: bool = False

    @classmethod
    def of_layers(cls, parameters: Iterable[Tensor]) -> RouterCost:
        """Of linear layers: every weight is read and multiplied with once."""
        each = list(parameters)
        return cls(
            multiplies=sum(p.numel() for p in each if p.ndim == 2),
            bytes=sum(p.nbytes for p in each),
            parameters=sum(p.numel() for p in each),
        )
