"""The linear layers an FFN is made of: what they hold, and whether calling them is no more than a product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lte.errors import ConfigError
from lte.nn.linear import FastLinear
from lte.nn.quantized import QuantizedWeight
from lte.ops import FFNWeights


class DeferredLinear(nn.Linear):
    """A linear layer that passes its input through and does its work when asked (:meth:`project`)."""

    @classmethod
    def take(cls, linear: nn.Linear) -> DeferredLinear:
        """Take over the parameters of ``linear``."""
        new = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        new.weight, new.bias = linear.weight, linear.bias
        return new

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` itself."""
        return x

    def project(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., F]."""
        return F.linear(x, self.weight, self.bias)


def neuron_rows(projection: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight of a linear layer as [out, in], and its bias; transformers' ``Conv1D`` stores it as [in, out]."""
    weight, bias = getattr(projection, "weight", None), getattr(projection, "bias", None)
    if not isinstance(weight, Tensor):
        raise ConfigError(
            f"a {type(projection).__name__} stands in the place of an FFN's projection and has no weight to look at; "
            "merge the adapter into the model first, or use linear routers (method=lte)"
        )
    assert bias is None or isinstance(bias, Tensor)
    is_conv1d = hasattr(projection, "nf")
    return (weight.T if is_conv1d else weight), bias


def is_packed(weights: FFNWeights) -> bool:
    """Whether every neuron's row is contiguous."""
    return all(w is None or w.stride(1) == 1 for w in (weights.up, weights.gate, weights.down))


def has_hooks(module: nn.Module) -> bool:
    """Whether something besides its own forward sees a module run."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def is_plain(module: nn.Module) -> bool:
    """Whether calling a projection is no more than multiplying with its weight, as an operator does."""
    if isinstance(module, QuantizedWeight):
        return not has_hooks(module)
    known = type(module) in (nn.Linear, FastLinear, DeferredLinear) or hasattr(module, "nf")
    return known and type(module.weight) is nn.Parameter and not has_hooks(module)


def pack_rows(module: nn.Module, copy: Callable[[Tensor], Tensor], *, transpose: bool) -> None:
    """Lay a projection's weight out with contiguous rows, of its transpose if asked; shape and values stay."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    rows = copy(weight.data.T if transpose else weight.data)
    weight.data = rows.T if transpose else rows


def keep_rows(module: Any, rows: Tensor, *, of_inputs: bool) -> None:
    """Cut a projection, ``nn.Linear`` or ``Conv1D``, down to some of its inputs, or of its outputs."""
    stored_as_inputs_first = hasattr(module, "nf")
    module.weight = kept(module.weight, rows, int(of_inputs != stored_as_inputs_first))
    if not of_inputs and module.bias is not None:
        module.bias = kept(module.bias, rows, 0)
    name = ("nx" if of_inputs else "nf") if stored_as_inputs_first else ("in_features" if of_inputs else "out_features")
    setattr(module, name, len(rows))


def kept(parameter: Tensor, rows: Tensor, dim: int) -> nn.Parameter:
    """Some rows of a parameter, or columns with ``dim=1``."""
    chosen = parameter.data.index_select(dim, rows.to(parameter.device))
    return nn.Parameter(chosen, requires_grad=parameter.requires_grad)
