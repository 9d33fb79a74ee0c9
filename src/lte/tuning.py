"""Training what surrounds rounded weights: the scales of the groups, and the norms, by the predictions from before."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte.activations import device_inputs, token_count
from lte.errors import ConfigError, LTEError
from lte.nn import LearnedPlanes, QuantizedLinear, sparse_ffns

STEP_TOKENS = 2048
"""Of a step, where a command says how many."""

logger = logging.getLogger(__name__)

LEARNING_RATE = 5e-3
"""Of factors that begin at 1, for weights of 4 bits: Adam moves them by about this much a step."""


def batches_per_step(batches: Sequence[Mapping[str, Tensor]]) -> int:
    """How many batches hold about ``STEP_TOKENS`` tokens: at least one."""
    return max(1, round(STEP_TOKENS * len(batches) / token_count(batches)))


def tune_quantized(
    model: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    steps: int,
    *,
    accumulation: int = 1,
    learning_rate: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Train the scales of a model of few bits, in place, to predict what the model it was rounded from does.

    The codes stay. Every group's scale gets a factor, every norm stays a parameter, and what is learned is folded into
    both. The loss is the KL divergence of the predictions (distillation), so labels are not needed.

    Args:
        model: of few bits; experts, and neurons in two planes, are chosen by the thresholds it has. Those of neurons
            choose by changed scales afterwards: set them again (:func:`lte.planes.set_bits_per_token`).
        teacher: the model of before, with the same tokens.
        batches: model inputs, begun anew when there are fewer than the steps take.
        steps: of AdamW, the rate rising over the first tenth and falling to 0.
        accumulation: batches to a step.
        learning_rate: of the factors, and of the norms; None for one that goes with the distance between two codes,
            :data:`LEARNING_RATE` for 4 bits and half as much for every bit more.
        progress: called with steps done and in all.

    Returns:
        The loss of every step.

    Raises:
        ConfigError: no weights that could be tuned, or no data.
        LTEError: the loss is no number.
    """
    layers = [module for module in model.modules() if type(module) is QuantizedLinear]
    planes = [LearnedPlanes(ffn) for ffn in sparse_ffns(model) if ffn.is_nested]
    if not layers and not planes:
        raise ConfigError("the model has no weights of few bits whose scales could be trained; lte.quantize makes them")
    if not batches:
        raise ConfigError(f"steps={steps} need data; give some batches of model inputs")
    config: Any = model.config
    learning_rate = default_rate(config.quantization_config.weights.bits) if learning_rate is None else learning_rate
    check_steps(steps, learning_rate)
    norms = [p for p in model.parameters() if p.requires_grad and p.ndim == 1 and p.is_floating_point()]
    learned = [layer.learn_scales() for layer in layers] + [p for ffn in planes for p in ffn.parameters()]
    losses: list[float] = []
    try:
        with _only(model, [*norms, *learned]), _in_float32(norms), _standing_in(planes):
            optimizer = torch.optim.AdamW([*norms, *learned], lr=learning_rate, weight_decay=0.0)
            rising = max(1, steps // 10)
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: min((step + 1) / rising, (steps - step) / steps)
            )
            for step in range(steps):
                loss = 0.0
                for number in range(step * accumulation, (step + 1) * accumulation):
                    loss += _backward(model, teacher, batches[number % len(batches)], accumulation)
                if not math.isfinite(loss):
                    raise LTEError(f"the loss was {loss} at step {step + 1}; use a smaller learning rate")
                nn.utils.clip_grad_norm_([*norms, *learned], 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                losses.append(loss)
                if progress is not None:
                    progress(step + 1, steps)
    finally:  # a run that is interrupted keeps what it has learned
        for layer in layers:
            layer.fix_scales()
        for ffn in planes:
            ffn.fix()
    few = max(1, steps // 5)
    begun, ended = (sum(part) / few for part in (losses[:few], losses[-few:]))
    said = f"KL divergence {begun:.4f} in the first {few} steps, {ended:.4f} in the last"
    if steps > 1 and ended >= begun:
        logger.warning("training the scales brought nothing (%s); use a smaller learning rate or more steps", said)
    else:
        logger.info("the scales were trained: %s", said)
    return losses


def default_rate(bits: int) -> float:
    """See :func:`tune_quantized`."""
    return min(1e-2, LEARNING_RATE * 2.0 ** (4 - bits))


def check_steps(steps: int, learning_rate: float) -> None:
    """ConfigError for settings that cannot be."""
    if steps < 1 or not 0 < learning_rate < 1:
        raise ConfigError(f"steps={steps}, learning_rate={learning_rate}: at least 1, and between 0 and 1")


def _backward(model: Any, teacher: Any, batch: Mapping[str, Tensor], parts: int) -> float:
    """Add the gradients of one of so many parts of a step; its share of the loss."""
    parameter = next(iter(model.parameters()))
    dtype, device = parameter.dtype, parameter.device
    inputs, mask_T = device_inputs(_without_labels(batch), device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss = _divergence(model(**inputs, use_cache=False).logits, _predicted(teacher, inputs), mask_T) / parts
    loss.backward()
    return float(loss.detach())


@torch.no_grad()
def _predicted(teacher: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    logits: Tensor = teacher(**inputs, use_cache=False).logits
    return logits


def _divergence(logits_BSV: Tensor, wanted_BSV: Tensor, mask_T: Tensor | None) -> Tensor:
    """Mean KL divergence of predictions from those wanted, over the real tokens."""
    logits_TV, wanted_TV = logits_BSV.flatten(0, 1), wanted_BSV.flatten(0, 1)
    if mask_T is not None:
        logits_TV, wanted_TV = logits_TV[mask_T], wanted_TV[mask_T]
    log_q, log_p = (each.float().log_softmax(-1) for each in (logits_TV, wanted_TV))
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def _without_labels(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


@contextmanager
def _only(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Any:
    """Nothing else is trained meanwhile."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    chosen = set(map(id, parameters))
    for parameter in before:
        parameter.requires_grad_(id(parameter) in chosen)
    try:
        yield
    finally:
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)


@contextmanager
def _standing_in(planes: Sequence[LearnedPlanes]) -> Any:
    for each in planes:
        each.ffn.forward = each  # type: ignore[method-assign]
    try:
        yield
    finally:
        for each in planes:
            del each.ffn.__dict__["forward"]


@contextmanager
def _in_float32(parameters: Sequence[nn.Parameter]) -> Any:
    """A small step would be lost in fewer bits."""
    before = [parameter.dtype for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in zip(parameters, before, strict=True):
            parameter.data = parameter.data.to(dtype)
