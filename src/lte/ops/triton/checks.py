"""What the kernels can take; every refusal names the tensor, its value and the way out."""

from __future__ import annotations

import os
from dataclasses import fields

import torch
from torch import Tensor

from lte.errors import LTEError
from lte.ops.reference import ACTIVATIONS
from lte.ops.weights import FFNWeights

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_ffn(x_TD: Tensor, weights: FFNWeights) -> None:
    """The input and the weights of the FFN."""
    if x_TD.ndim != 2 or x_TD.shape[1] != weights.d_model:
        raise LTEError(
            f"x_TD has shape {list(x_TD.shape)}; give [tokens, {weights.d_model}], the width of the weights."
        )
    if x_TD.device.type != "cuda" and not INTERPRETED:
        raise LTEError(f"x_TD is on {x_TD.device}; the Triton kernels need CUDA: use sparse_ffn_reference there.")
    if x_TD.dtype not in _DTYPES:
        raise LTEError(f"x_TD is {x_TD.dtype}; the Triton kernels take float32, bfloat16 and float16.")
    if weights.activation not in ACTIVATIONS:
        raise LTEError(f"activation {weights.activation!r} is unknown; it is one of {', '.join(sorted(ACTIVATIONS))}.")
    if torch.is_grad_enabled() and x_TD.requires_grad:
        raise LTEError("x_TD requires a gradient, which the Triton kernels do not compute: run under torch.no_grad().")
    n, d = weights.d_ff, weights.d_model
    shapes = {"up": (n, d), "down": (n, d), "gate": (n, d), "up_bias": (n,), "gate_bias": (n,), "down_bias": (d,)}
    for field in fields(weights):
        value = getattr(weights, field.name)
        if isinstance(value, Tensor):
            check_tensor(f"weights.{field.name}", value, shapes[field.name], x_TD.device)
            if value.dtype != x_TD.dtype:
                raise LTEError(f"weights.{field.name} is {value.dtype} and x_TD {x_TD.dtype}; convert one of them.")


def check_tensor(name: str, value: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Shape, device, and a unit stride in the last dimension."""
    if tuple(value.shape) != shape:
        raise LTEError(f"{name} has shape {list(value.shape)}; {list(shape)} is needed.")
    if value.device != device:
        raise LTEError(f"{name} is on {value.device} and x_TD on {device}; move one of them.")
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        raise LTEError(f"{name} has strides {list(value.stride())}; its rows must be contiguous: call .contiguous().")


def check_experts(n_neurons: int, n_experts: int) -> None:
    """Experts of equal size."""
    if n_experts < 1 or n_neurons % n_experts:
        raise LTEError(f"{n_neurons} neurons do not divide into {n_experts} experts of equal size.")
