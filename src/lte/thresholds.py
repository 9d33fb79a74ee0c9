"""The dial after training: moving thresholds so that a model reaches a sparsity, and remembering where they stood."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lte.calibration import device_inputs
from lte.config import OperatingPoint, SparsityConfig
from lte.errors import CalibrationError, ConfigError
from lte.nn import Mode, Routing, observe_routing, set_mode, sparse_ffns

BINS, LOGIT_RANGE = 8192, 20.0
"""Resolution of the histograms of logits."""

TOLERANCE, MISSED, DISTINCT = 0.002, 0.01, 0.005
"""Differences of sparsity: where a search ends, where it has failed, where two operating points are two."""

MAX_MOVES = 8

DIAL_TOKENS = 32768
"""Tokens of a text on which thresholds are found: parts of one text differ by a percentage point or two."""


def thresholds_of(model: nn.Module) -> list[float]:
    """The threshold of every FFN's router, in layer order."""
    return [ffn.router.threshold for ffn in sparse_ffns(model)]


def set_thresholds(model: Any, thresholds: Sequence[float]) -> None:
    """Move the thresholds, one per FFN, in the model and in what its ``config.json`` will say."""
    ffns = sparse_ffns(model)
    if len(thresholds) != len(ffns):
        raise ConfigError(f"{len(thresholds)} thresholds were given for {len(ffns)} sparse FFNs; give one for each")
    for ffn, threshold in zip(ffns, thresholds, strict=True):
        ffn.router.threshold = threshold
    model.config.quantization_config.thresholds = list(thresholds)


def set_sparsity(model: Any, sparsity: float) -> None:
    """Run a model at another sparsity, from the operating points :func:`calibrate` left in it.

    Between two of them thresholds are interpolated, on the scale of the logits; the nearer the points, the closer the
    sparsity. Also a method of every sparse model: ``model.set_sparsity(0.6)``.

    Raises:
        ConfigError: the model has no thresholds, no operating points, or none on both sides of ``sparsity``.
    """
    _check_dial(model)
    if not isinstance(sparsity, (int, float)):
        raise ConfigError(f"sparsity={sparsity!r} must be a number, for instance 0.6")
    points: list[OperatingPoint] = model.config.quantization_config.operating_points
    if not points:
        raise ConfigError(
            "the model has no operating points; make some: lte calibrate MODEL --data FILE --target-sparsity 0.5,0.7"
        )
    low, high = points[0].sparsity, points[-1].sparsity
    if not low - MISSED <= sparsity <= high + MISSED:
        raise ConfigError(
            f"sparsity={sparsity} is outside of what the model was calibrated for, {low:.4f} to {high:.4f}; "
            "calibrate it further with lte calibrate"
        )
    sparsity = min(max(sparsity, low), high)
    above = next(point for point in points if point.sparsity >= sparsity)
    below = next(point for point in reversed(points) if point.sparsity <= sparsity)
    gap = above.sparsity - below.sparsity
    share = (sparsity - below.sparsity) / gap if gap > 0 else 0.0
    set_thresholds(
        model,
        [
            _sigmoid((1 - share) * _logit(left) + share * _logit(right))
            for left, right in zip(below.thresholds, above.thresholds, strict=True)
        ],
    )


def _check_dial(model: nn.Module) -> None:
    ffns = sparse_ffns(model)
    if not ffns:
        raise ConfigError(f"{type(model).__name__} is dense and has no thresholds; make it sparse with lte.sparsify")
    router = ffns[0].router
    if not router.uses_threshold:
        raise ConfigError(
            f"a {type(router).__name__} has no threshold to calibrate: it always runs the same share of experts, "
            "which sparsify's config sets"
        )


def enable_dial(model: Any) -> None:
    """Give a sparse model its :func:`set_sparsity` method."""
    model.set_sparsity = partial(set_sparsity, model)  # a bound method would not survive pickling


def apply_config(model: nn.Module, config: SparsityConfig) -> None:
    """Put the thresholds a checkpoint was saved with in place; ConfigError where their number is not the model's."""
    count = len(sparse_ffns(model))
    for thresholds in [config.thresholds or (), *(point.thresholds for point in config.operating_points)]:
        if len(thresholds) not in (0, count):
            raise ConfigError(f"{len(thresholds)} thresholds for {count} sparse FFNs; config.json was edited")
    for ffn, threshold in zip(sparse_ffns(model), config.thresholds or (), strict=False):
        ffn.router.threshold = threshold


def calibrate(
    model: Any,
    batches: Iterable[Mapping[str, Tensor]],
    sparsity: float,
    *,
    per_layer: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> OperatingPoint:
    """Move the thresholds so that the model reaches a sparsity on a text, and keep them as an operating point.

    Args:
        model: a sparse model with threshold routers; it is left in hard mode, at the new thresholds.
        batches, sparsity, per_layer, progress: see :func:`find_thresholds`.

    Returns:
        Thresholds, and the sparsity they were seen to give.

    Raises:
        ConfigError: S outside (0, 1), or a router without a threshold.
        CalibrationError: the sparsity, with ``per_layer`` of any layer, stays more than one percentage point away.

    Whatever is raised, the thresholds are as before.
    """
    _check_dial(model)
    before = thresholds_of(model)
    try:
        found = find_thresholds(model, batches, sparsity, per_layer=per_layer, progress=progress)
        nearest = max(_reached(found), key=lambda reached: abs(reached - sparsity))
        if abs(nearest - sparsity) > MISSED:
            where = f"layer {found.sparsity_per_layer.index(nearest)}" if per_layer else "the model"
            raise CalibrationError(
                f"sparsity {sparsity} cannot be reached by moving thresholds: {where} stayed at {nearest:.3f}, as too "
                "many scores are equal there (a separability loss does that); train for that sparsity instead"
            )
    except BaseException:
        set_thresholds(model, before)
        raise
    remember(model, found)
    return found


def remember(model: Any, point: OperatingPoint) -> None:
    """Add an operating point, in place of one for the same sparsity, and of all that are not of its kind.

    Between a point with one threshold and one with a threshold per layer, interpolation means nothing.
    """
    config = model.config.quantization_config
    others = [
        other
        for other in config.operating_points
        if other.per_layer == point.per_layer and abs(other.sparsity - point.sparsity) > DISTINCT
    ]
    config.operating_points = sorted([*others, point], key=lambda each: each.sparsity)


def find_thresholds(
    model: Any,
    batches: Iterable[Mapping[str, Tensor]],
    sparsity: float,
    *,
    per_layer: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> OperatingPoint:
    """Move the thresholds as near to a sparsity as they go.

    What a layer sees depends on the thresholds before it, so the model is run again after every move, until the
    sparsity is within 0.2 percentage points or eight moves were made.

    Args:
        model: a sparse model with threshold routers; it is left in hard mode, at the new thresholds.
        batches: model inputs.
        sparsity: S, in (0, 1), over all layers and tokens.
        per_layer: reach S in every layer, instead of with one threshold for all.
        progress: called with moves made and the most that will be.

    Returns:
        Thresholds, and the sparsity they were seen to give.
    """
    if not 0 < sparsity < 1:
        raise ConfigError(f"target sparsity {sparsity} must lie between 0 and 1")
    _check_dial(model)
    kept = list(batches)
    best: OperatingPoint | None = None
    error = math.inf
    aims = [sparsity] * (len(sparse_ffns(model)) if per_layer else 1)
    for move in range(MAX_MOVES + 1):
        histogram, per_ffn = _measure(model, kept)
        thresholds = tuple(thresholds_of(model))
        here = OperatingPoint(
            sparsity=sum(per_ffn) / len(per_ffn),
            thresholds=thresholds,
            sparsity_per_layer=tuple(per_ffn),
            per_layer=per_layer,
        )
        missed = [reached - sparsity for reached in _reached(here)]
        if max(map(abs, missed)) < error and (per_layer or len(set(thresholds)) == 1):
            best, error = here, max(map(abs, missed))
        if progress is not None:
            progress(move, MAX_MOVES)
        if error <= TOLERANCE or move == MAX_MOVES:
            break
        if move:  # what the last move missed by, the next one aims off
            aims = [min(max(aim - miss, 1e-4), 1 - 1e-4) for aim, miss in zip(aims, missed, strict=True)]
        rows = histogram if per_layer else histogram.mean(0, keepdim=True)
        moved = [_sigmoid(_quantile(row, aim)) for row, aim in zip(rows, aims, strict=True)]
        set_thresholds(model, moved if per_layer else moved * len(histogram))
    assert best is not None
    set_thresholds(model, best.thresholds)
    return best


def _reached(point: OperatingPoint) -> tuple[float, ...]:
    """What has to equal the sparsity asked for: that of every layer, or the mean alone."""
    return point.sparsity_per_layer if point.per_layer else (point.sparsity,)


def measure_sparsity(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Sparsity of a model in hard mode on some batches of model inputs, padding left out."""
    per_ffn = _measure(model, list(batches))[1]
    return sum(per_ffn) / len(per_ffn)


@torch.no_grad()
def _measure(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, list[float]]:
    """Histogram of every layer's logits, [L, BINS] with rows summing to 1, and its sparsity at the thresholds."""
    n_layers = len(sparse_ffns(model))
    device = next(model.parameters()).device
    histogram = torch.zeros(n_layers, BINS, dtype=torch.float64)
    active = torch.zeros(n_layers, dtype=torch.long, device=device)
    token_mask: Tensor | None = None

    def observe(layer: int, routing: Routing) -> None:
        scores_TE, mask_TE = (t.flatten(0, -2) for t in (routing.scores, routing.mask))
        if token_mask is not None:
            scores_TE, mask_TE = scores_TE[token_mask], mask_TE[token_mask]
        logits = torch.logit(scores_TE.float(), eps=1e-9).clamp(-LOGIT_RANGE, LOGIT_RANGE)
        histogram[layer] += torch.histc(logits, BINS, -LOGIT_RANGE, LOGIT_RANGE).cpu()
        active[layer] += mask_TE.sum()

    body = getattr(model, "base_model", model)  # logits are not needed, and take memory
    was_training = model.training
    model.eval()
    set_mode(model, Mode.HARD)
    try:
        with observe_routing(model, observe):
            for batch in batches:
                inputs, token_mask = device_inputs(batch, device)
                inputs.pop("labels", None)
                body(**inputs)
    finally:
        model.train(was_training)
    seen = histogram.sum(1)
    if not seen.all():
        raise ConfigError("the calibration data holds no tokens")
    return histogram / seen[:, None], (1 - active.cpu() / seen).tolist()


def _quantile(histogram: Tensor, share: float) -> float:
    """The logit below which ``share`` of the mass lies, linear inside a bin."""
    cumulated = histogram.cumsum(0)
    index = int(torch.searchsorted(cumulated, torch.tensor(share, dtype=cumulated.dtype)).clamp(max=BINS - 1))
    before = float(cumulated[index - 1]) if index else 0.0
    inside = (share - before) / max(float(histogram[index]), 1e-12)
    width = 2 * LOGIT_RANGE / BINS
    return -LOGIT_RANGE + (index + min(max(inside, 0.0), 1.0)) * width


def _logit(probability: float) -> float:
    return math.log(probability) - math.log1p(-probability)


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def shifted(threshold: float, shift: float) -> float:
    """A threshold moved by ``shift`` in logits, kept inside (0, 1)."""
    return _sigmoid(min(max(_logit(threshold) + shift, -LOGIT_RANGE), LOGIT_RANGE))
