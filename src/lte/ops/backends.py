"""Which implementation of the operator runs. Nothing falls back in silence: the choice is logged, with its reason."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache

import torch
from torch import Tensor

from lte.errors import BackendError
from lte.ops import cpu
from lte.ops.weights import FFNWeights

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("auto", "fastest", "reference", "cpu", "triton")
ENVIRONMENT = "LTE_BACKEND"
SMALL_BATCH = 64
"""Tokens up to which ``auto`` takes a sparse kernel where nothing was measured; above, dense matrix products win."""


def choose(impl: str, x_TD: Tensor, weights: FFNWeights) -> str:
    """``reference``, ``cpu`` or ``triton`` for one call.

    Args:
        impl: the implementation asked for; ``fastest`` is the kernels of the device where they can run, and ``auto``
            the same for up to 64 tokens. The environment variable ``LTE_BACKEND`` replaces those two.
        x_TD: [T, D] inputs.
        weights: the FFN.

    Raises:
        BackendError: the implementation asked for is unknown or cannot run here.
    """
    impl = requested(impl)
    if impl == "reference":
        return impl
    if impl in ("auto", "fastest"):
        fast = "triton" if x_TD.device.type == "cuda" else "cpu"
        if x_TD.device.type not in ("cpu", "cuda"):
            return "reference"
        reason = obstacle(fast, x_TD.dtype, x_TD.device) or layout_obstacle(x_TD, weights)
        _log_choice(fast, str(x_TD.device.type), str(x_TD.dtype), reason)
        return "reference" if reason or (impl == "auto" and len(x_TD) > SMALL_BATCH) else fast
    reason = obstacle(impl, x_TD.dtype, x_TD.device) or layout_obstacle(x_TD, weights)
    if reason:
        raise BackendError(f"backend {impl!r} cannot run: {reason}; use another, or impl='auto'")
    return impl


def choose_for_codes(x_TD: Tensor) -> str:
    """``cpu``, ``triton`` or ``reference`` for weights of few bits."""
    if requested("auto") == "reference" or torch.compiler.is_compiling() or x_TD.device.type not in ("cpu", "cuda"):
        return "reference"
    fast = "triton" if x_TD.device.type == "cuda" else "cpu"
    return "reference" if obstacle(fast, x_TD.dtype, x_TD.device) else fast


def choose_for_scores(impl: str, x_TD: Tensor, weights: FFNWeights) -> str:
    """The same for the scores of an FFN's copy, for any number of tokens: of the FFN itself, only biases are read."""
    impl = requested(impl)
    fast = "triton" if x_TD.device.type == "cuda" else "cpu"
    if impl in ("auto", "fastest"):
        reason = obstacle(fast, x_TD.dtype, x_TD.device) or bias_obstacle(x_TD, weights)
        return "reference" if reason or x_TD.device.type not in ("cpu", "cuda") else fast
    return choose(impl, x_TD, weights)


def requested(impl: str) -> str:
    """What the caller, or for ``auto`` the environment, asks for; BackendError where it is no implementation."""
    source = "impl"
    if impl in ("auto", "fastest") and os.environ.get(ENVIRONMENT):
        source, impl = ENVIRONMENT, os.environ[ENVIRONMENT]
    if impl not in IMPLEMENTATIONS:
        raise BackendError(f"{source}={impl!r} is no backend; choose one of {', '.join(IMPLEMENTATIONS)}")
    return impl


@cache
def obstacle(impl: str, dtype: torch.dtype, device: torch.device) -> str:
    """Why a backend cannot run with a dtype on a device; empty where it can."""
    if impl == "cpu":
        if device.type != "cpu":
            return f"it runs on the CPU, the tensors are on {device}"
        if dtype not in cpu.DTYPES:
            return f"its dtypes are float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
        return cpu.unavailable()
    if device.type != "cuda" and not os.environ.get("TRITON_INTERPRET"):
        return f"it runs on a GPU, the tensors are on {device}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its dtypes are float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return "" if _has_triton() else "Triton is not installed (pip install triton)"


def layout_obstacle(x_TD: Tensor, weights: FFNWeights) -> str:
    """Why the kernels cannot read these weights; empty where they can."""
    for name, tensor in (("gate", weights.gate), ("up", weights.up), ("down", weights.down)):
        if tensor is None:
            continue
        if tensor.stride(1) != 1:
            return f"a neuron's row of the {name} matrix is not contiguous; lte.prepare_for_inference packs it"
        if tensor.dtype != x_TD.dtype:
            return f"x is {x_TD.dtype}, the {name} matrix {tensor.dtype}"
    return bias_obstacle(x_TD, weights)


def bias_obstacle(x_TD: Tensor, weights: FFNWeights) -> str:
    """Why the kernels cannot read the biases; empty where they can."""
    for name, bias in (("gate", weights.gate_bias), ("up", weights.up_bias), ("down", weights.down_bias)):
        if bias is not None and (bias.dtype != x_TD.dtype or not bias.is_contiguous()):
            return f"the {name} bias is {bias.dtype} with stride {bias.stride()}; wanted {x_TD.dtype}, contiguous"
    return ""


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _log_choice(fast: str, device: str, dtype: str, reason: str) -> None:
    if reason:
        logger.warning("sparse FFN on %s in %s runs the reference, no faster than dense: %s", device, dtype, reason)
    else:
        detail = f" ({cpu.instruction_set()})" if fast == "cpu" else ""
        logger.info("sparse FFN on %s in %s runs the %s kernels%s", device, dtype, fast, detail)
