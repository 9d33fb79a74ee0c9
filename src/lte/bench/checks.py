"""Whether what is timed is right: each FFN against the reference, and the logits against the model's slow path."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lte.bench.rows import TOLERANCE
from lte.families import blocks_of
from lte.nn import NestedForm, QuantizedWeight, SparsityMeter, observe_routing, sparse_ffns
from lte.ops import SMALL_BATCH, FFNWeights, QuantizedFFN, sparse_ffn_reference
from lte.ops.backends import ENVIRONMENT
from lte.ops.nested import nested_ffn_reference
from lte.ops.quantized import quantized_ffn_reference

LOGITS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Relative RMS error of the fast path's logits against the masked dense path. In bf16 both round, at different places,
and a score near its threshold may fall on the other side; each layer's FFN alone is held to a tighter tolerance."""

CODES_TOLERANCE = 0.01, 0.2
"""The same of FFN and logits where weights are of few bits: what lies between two of the 8-bit inputs may fall to
either side, in every layer, and after it the scores near a threshold."""


def tolerances(model: Any) -> tuple[float, float]:
    """Of the FFNs' error and the logits'."""
    if any(isinstance(module, QuantizedWeight) for module in model.modules()):
        return max(TOLERANCE[model.dtype], CODES_TOLERANCE[0]), CODES_TOLERANCE[1]
    return TOLERANCE[model.dtype], LOGITS_TOLERANCE[model.dtype]


SLACK = 2.0
"""How many times what rounding does to the slow path, see :class:`LogitsCheck`, the fast one may differ from it."""


@dataclass(frozen=True)
class LogitsCheck:
    """Of the fast path's logits.

    Attributes:
        sparsity: on decoded tokens.
        error: relative RMS, against the slow path.
        noise: the same of the slow path against itself, what every block puts out having been moved to the next
            number of its dtype, up or down at random. Over many layers of random weights that alone moves scores
            across their thresholds.
        allowed: see LOGITS_TOLERANCE; or :data:`SLACK` times the noise, where that is more.
    """

    sparsity: float
    error: float
    noise: float
    allowed: float


def check_logits(model: Any, ids_BS: Tensor, new_tokens: int) -> LogitsCheck:
    """Decode some tokens, and compare with the slow path."""
    steps = max(2, min(8, new_tokens))
    output = model.generate(
        ids_BS,
        attention_mask=torch.ones_like(ids_BS),
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    meter = SparsityMeter(len(sparse_ffns(model)))
    tokens = torch.zeros_like(output.sequences[:, :-1], dtype=torch.bool)
    tokens[:, ids_BS.shape[1] :] = True
    meter.set_token_mask(tokens)
    choosers = [ffn.choose_path for ffn in sparse_ffns(model)]
    for ffn in sparse_ffns(model):
        ffn.choose_path = lambda tokens: ("reference", 1.0)

    def slow() -> Tensor:
        return model(output.sequences[:, :-1], use_cache=False).logits[:, ids_BS.shape[1] - 1 :].float()

    with observe_routing(model, meter), _reference():
        wanted = slow()
        meter.set_token_mask(False)
    with _reference(), _rounded_blocks(model):
        rounded = slow()
    for ffn, chooser in zip(sparse_ffns(model), choosers, strict=True):
        ffn.choose_path = chooser
    got = torch.stack([logits.float() for logits in output.logits], dim=1)
    error, noise = (float((each - wanted).norm() / wanted.norm()) for each in (got, rounded))
    return LogitsCheck(meter.overall, error, noise, max(tolerances(model)[1], SLACK * noise))


@contextmanager
def _rounded_blocks(model: Any) -> Iterator[None]:
    generator = torch.Generator(device=model.device).manual_seed(0)
    step = torch.finfo(model.dtype).eps / 2

    def move(module: Any, args: Any, out: Any) -> Any:
        hidden = out[0] if isinstance(out, tuple) else out
        up = torch.rand(hidden.shape, generator=generator, device=hidden.device) < 0.5
        moved = hidden.double() * (1 + step * (2 * up.double() - 1))
        return (moved.to(hidden.dtype), *out[1:]) if isinstance(out, tuple) else moved.to(hidden.dtype)

    handles = [block.register_forward_hook(move) for block in blocks_of(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _reference() -> Iterator[None]:
    """Layers of few bits run their definition."""
    before = os.environ.get(ENVIRONMENT)
    os.environ[ENVIRONMENT] = "reference"
    try:
        yield
    finally:
        os.environ.pop(ENVIRONMENT) if before is None else os.environ.update({ENVIRONMENT: before})


def ffn_error(model: Any, tokens: int) -> float:
    """Largest error of any layer's FFN against the float32 reference, relative to its largest value."""
    worst = 0.0
    for ffn in sparse_ffns(model):
        form = ffn.router.form()
        weights = form.weights if isinstance(form, NestedForm) else ffn.quantized() or ffn.weights()
        x_TD = torch.randn(tokens, weights.d_model, generator=torch.Generator().manual_seed(ffn.layer_index))
        x_TD = x_TD.to(model.device, model.dtype)
        if isinstance(form, NestedForm):
            wanted = nested_ffn_reference(x_TD.float(), form.weights, form.cut, form.fine_cut)
        elif isinstance(weights, QuantizedFFN):
            wanted = quantized_ffn_reference(x_TD.float(), weights, ffn.router(x_TD).mask)
        else:
            assert isinstance(weights, FFNWeights)
            mask = ffn.router(x_TD).mask if ffn.masks_prompts or tokens <= SMALL_BATCH else None
            wanted = sparse_ffn_reference(x_TD.float(), weights.float(), mask)
        worst = max(worst, relative_error(ffn(x_TD[None])[0], wanted))
    return worst


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest value wanted."""
    return float((got.float() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6))
