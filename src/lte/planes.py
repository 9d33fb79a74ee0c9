"""Precision by need: neurons that are left out, run on their weights' upper bits, or on all, token by token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lte.activations import every_nth
from lte.config import MethodConfig, OperatingPoint, WeightsConfig
from lte.errors import ConfigError
from lte.nn import CopyRouter, NestedDown, NestedForm, NestedLinear, SparseFFN, sparse_ffns
from lte.ops.lowbit import nearest_codes
from lte.ops.nested import NestedFFN, NestedMatrix, NestedRows
from lte.rounding import compensated_codes, compensated_columns
from lte.thresholds import find_thresholds, measure_margins, set_thresholds

HALF = 0.5
"""Of the ratio of the two thresholds that independent errors would ask for. Measured on stories-3m, at 2.9 to 4.8 bits
in planes of 3 + 1, 3 + 2 and 4 + 2: best, or next to it; what is left out errs all in one
direction."""

EXACT = 16
"""Neurons of an FFN whose rows of the down projection are not rounded. A language model has a few with massive
activations: in SmolLM2-135M, of 1536, 4 make the difference between +4.3 and +0.16 nats (4 bits, rounded one by one),
and 16 bring it to +0.11."""

TOKENS = 4096
"""Most that thresholds are found on."""

SEARCH = 40
"""Halvings of the interval a threshold is searched in."""


def weights_config(
    bits: int,
    *,
    by_neuron: bool,
    by_need: bool = False,
    group: int | None = None,
    coarse: int | None = None,
    **settings: Any,
) -> WeightsConfig:
    """Settings of weights of few bits, with what is best known for what is not given.

    Args:
        bits: of a weight.
        by_neuron: whether FFNs are put into two planes.
        group: weights that share a scale; None for 64 in two planes, else 32.
        by_need: whether some neurons are to run on their upper bits alone.
        coarse: bits of the upper plane; None for 4, and for 3 of 4 or 5 by need. Lower bits are single rows, which take
            longer than what is not read of them saves.
        **settings: others of :class:`WeightsConfig`.
    """
    if by_neuron:
        coarse = coarse or min(bits, 3 if by_need and bits <= 5 else 4)
        settings = {"exact": EXACT, **settings}
    return WeightsConfig(
        bits=bits, group=(64 if by_neuron else 32) if group is None else group, coarse=coarse, **settings
    )


def picks_neurons(method: MethodConfig) -> bool:
    """Whether FFNs under a method are put into two planes: their own copy picks single neurons."""
    return method.method == "self-prediction" and method.expert_size == 1


def is_by_neuron(ffn: SparseFFN) -> bool:
    """Whether the FFN's own copy picks single neurons of it."""
    return isinstance(ffn.router, CopyRouter) and ffn.router.n_experts > 1 and _size(ffn) == 1


def _size(ffn: SparseFFN) -> int:
    down = getattr(ffn, ffn.roles["down"]) if "down" in ffn.roles else None
    features = getattr(down, "in_features", 0)
    return features // ffn.router.n_experts


def check_planes(ffn: SparseFFN, settings: WeightsConfig) -> None:
    """ConfigError where an FFN of single neurons cannot be put into two planes."""
    if settings.coarse is None:
        raise ConfigError("weights: coarse is missing, but neurons are picked one by one")
    if "gate_up" in ffn.roles:
        raise ConfigError(
            "gate and up of this family are one matrix, which cannot lie in two planes yet; use experts of 32 neurons"
        )


def round_to_planes(
    module: NestedLinear | NestedDown, weight_ND: Tensor, squares_DD: Tensor | None, settings: WeightsConfig
) -> None:
    """Fill a projection with the codes of its weights, their scales such that both planes serve.

    Args:
        module: to hold them.
        weight_ND: as ``nn.Linear`` has it.
        squares_DD: of its inputs, or None; see :func:`lte.rounding.compensated_codes`.
        settings: bits and group.
    """
    bits, coarse = settings.bits, settings.coarse
    assert coarse is not None
    if isinstance(module, NestedDown):
        module.hold_planes(_round_down(weight_ND, squares_DD, settings))
    else:
        of = bits, settings.group
        if squares_DD is None:
            made = nearest_codes(weight_ND, *of, upper=coarse)
        else:
            made = compensated_codes(weight_ND, squares_DD, *of, upper=coarse)
        module.hold_planes(NestedMatrix.of(*made, bits, coarse, weight_ND.shape[1]))


def _round_down(weight_DF: Tensor, squares_FF: Tensor | None, settings: WeightsConfig) -> NestedRows:
    """Rows of the down projection; of those that add most to its error, rounded by themselves, none is rounded."""
    bits, coarse = settings.bits, settings.coarse
    assert coarse is not None
    d_model, group = len(weight_DF), settings.group
    codes_FD, scales_FG = nearest_codes(weight_DF.T, bits, group, upper=coarse)
    plain = NestedRows.of(codes_FD, scales_FG, bits, coarse, d_model)
    errors_F = (plain.dequantize() - weight_DF.T.float()).square().sum(1)
    if squares_FF is not None:
        errors_F = errors_F * squares_FF.diagonal()
    exact = errors_F.topk(min(settings.exact, len(errors_F))).indices.sort().values
    if squares_FF is not None:
        rest = torch.ones_like(errors_F, dtype=torch.bool)
        rest[exact] = False
        squares = squares_FF[rest][:, rest]
        codes, scales_FG[rest] = compensated_columns(weight_DF[:, rest], squares, bits, group, upper=coarse)
        codes_FD[rest] = codes.to(codes_FD.dtype)
    return NestedRows.of(codes_FD, scales_FG, bits, coarse, d_model, exact, weight_DF.T[exact])


def check_reachable(bits_per_token: float, settings: WeightsConfig, d_model: int) -> None:
    """ConfigError for bits that no thresholds give: more than the weights have, or less than gate and up alone take."""
    assert settings.coarse is not None
    of_scales, filled_up = 16 / settings.group, -(-d_model // settings.group) * settings.group / d_model
    least, most = 2 / 3 * (settings.coarse + of_scales) * filled_up, (settings.bits + of_scales) * filled_up
    if not least < bits_per_token <= most:
        raise ConfigError(
            f"bits_per_token={bits_per_token} is out of reach with {settings.bits} bits, {settings.coarse} of them "
            f"read of every neuron: from {least:.2f} to {most:.2f}. Use other bits, or another coarse"
        )


def set_bits_per_token(model: Any, batches: Iterable[Mapping[str, Tensor]], bits_per_token: float) -> OperatingPoint:
    """Move both thresholds of a model in two planes so that a token reads so many bits of an FFN weight in the mean.

    A neuron's error, left out or on its upper bits, is its score times a factor, so for least error at some bits the
    two thresholds have a ratio that the weights tell: of what a neuron's bits cost to what they gain, half of it.

    Args:
        model: of single neurons in two planes.
        batches: model inputs, of which some are used.
        bits_per_token: scales included.

    Returns:
        From which scores neurons run at all, and how many do; from which they do on all bits is in the routers.
    """
    kept = every_nth(list(batches), TOKENS)
    ffns = sparse_ffns(model)
    planes = planes_of(ffns[0])
    distance = _distance(ffns, planes)
    for ffn in ffns:
        ffn.router.fine = None
    set_thresholds(model, [0.5] * len(ffns))
    margins = measure_margins(model, kept)
    low, high = margins.quantile(0.0), margins.quantile(1.0)
    for _ in range(SEARCH):
        middle = (low + high) / 2
        read = planes.bits_read(1 - margins.share_below(middle), 1 - margins.share_below(middle + distance))
        low, high = (middle, high) if read > bits_per_token else (low, middle)
    off = min(max(margins.share_below(low), 1e-3), 1 - 1e-3)
    point = find_thresholds(model, kept, off)
    _set_fine(model, kept, bits_per_token, planes)
    return point


def _set_fine(model: Any, batches: list[Mapping[str, Tensor]], bits: float, planes: NestedFFN) -> None:
    """The second threshold, for the bits that the first one leaves."""
    margins = measure_margins(model, batches)
    on = 1 - margins.sparsity
    none, every = planes.bits_read(on, 0.0), planes.bits_read(on, on)
    share = min(max((bits - none) / max(every - none, 1e-9), 0.0), 1.0)
    fine = sparse_ffns(model)[0].router.cut + max(margins.quantile(1 - on * share), 0.0)
    for ffn in sparse_ffns(model):
        ffn.router.fine, ffn.router.fine_share = fine, share


def planes_of(ffn: SparseFFN) -> NestedFFN:
    """The weights of an FFN in two planes."""
    form = ffn.router.form()
    assert isinstance(form, NestedForm)
    return form.weights


def _distance(ffns: list[SparseFFN], planes: NestedFFN) -> float:
    """Of the two thresholds, in logits."""
    if planes.down.lower is None:
        return 0.0
    coarse, size = 0.0, 0.0
    for ffn in ffns:
        for part in ffn.projections():
            assert isinstance(part, NestedLinear | NestedDown)
            held = part.planes
            correction = held.correction()
            coarse += float(correction.square().sum())
            size += float(part.weight.square().sum())
    error = coarse / size  # of the upper bits, beside that of all, which is some part of it
    upper, lower = planes.down.upper.bits, planes.down.lower.bits
    return math.log(max(HALF * math.sqrt(lower / (upper / 3) * (1 - error) / error), 1.0))
