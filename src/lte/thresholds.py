"""The dial after training: moving thresholds so that a model reaches a sparsity, and remembering where they stood."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lte.activations import body_of, device_inputs, every_nth, token_count, without_cache
from lte.config import LayerwiseConfig, OperatingPoint, SparsityConfig
from lte.errors import CalibrationError, ConfigError
from lte.margins import Margins
from lte.nn import Mode, observe_routing, set_mode, sparse_ffns
from lte.nn.router import LOGIT_RANGE

TOLERANCE, MISSED, DISTINCT = 0.002, 0.01, 0.005
"""Differences of sparsity: where a search ends, where it has failed, where two operating points are two."""

MOVES, FEW_TOKENS = 3, 2048
"""Moves of thresholds made on part of the tokens, and the fewest tokens such a part has."""

DIAL_TOKENS = 16384
"""Tokens of a text on which thresholds are found: parts of one text differ by a percentage point or two."""


def thresholds_of(model: nn.Module) -> list[float]:
    """The threshold of every FFN's router, in layer order."""
    return [ffn.router.threshold for ffn in sparse_ffns(model)]


def set_thresholds(model: Any, thresholds: Sequence[float]) -> None:
    """Move the thresholds, one per FFN: where they are kept, in the routers, and so in the state dict."""
    ffns = sparse_ffns(model)
    if len(thresholds) != len(ffns):
        raise ConfigError(f"{len(thresholds)} thresholds were given for {len(ffns)} sparse FFNs; give one for each")
    for ffn, threshold in zip(ffns, thresholds, strict=True):
        ffn.router.threshold = threshold


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


def sparsity_set_for(model: Any) -> float | None:
    """The sparsity that the thresholds, as they stand, gave on the text they were found on; None where not known."""
    here = tuple(thresholds_of(model))
    points: list[OperatingPoint] = model.config.quantization_config.operating_points
    return next((point.sparsity for point in points if point.thresholds == here), None)


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


def check_points(model: nn.Module, config: SparsityConfig) -> None:
    """ConfigError where operating points have not as many thresholds as the model."""
    count = len(sparse_ffns(model))
    for point in config.operating_points:
        if len(point.thresholds) != count:
            raise ConfigError(f"{len(point.thresholds)} thresholds for {count} sparse FFNs; config.json was edited")


def calibrate(
    model: Any,
    batches: Iterable[Mapping[str, Tensor]],
    sparsity: float,
    *,
    per_layer: bool | None = None,
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
            where = f"layer {found.sparsity_per_layer.index(nearest)}" if found.per_layer else "the model"
            raise CalibrationError(
                f"sparsity {sparsity} cannot be reached by moving thresholds: {where} stayed at {nearest:.3f}, as too "
                "many scores are equal there (a ReLU does that, and a separability loss). Ask for that sparsity, or "
                "train for this one"
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
    per_layer: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> OperatingPoint:
    """Move the thresholds as near to a sparsity as they go, in at most two passes over the tokens.

    What a layer sees depends on the thresholds before it, so the model is run again after every move: on an eighth of
    the tokens until they are near, then on all of them, and after each of at most two more moves on half of them. A few
    thousand tokens cost little and are used whole throughout.

    Args:
        model: a sparse model with threshold routers; it is left in hard mode, at the new thresholds.
        batches: model inputs.
        sparsity: S, in (0, 1), over all layers and tokens.
        per_layer: reach S in every layer, instead of with one threshold for all; None for what the method is set to.
        progress: called with batches run and the most that will be.

    Returns:
        Thresholds, and the sparsity they were seen to give.
    """
    if not 0 < sparsity < 1:
        raise ConfigError(f"target sparsity {sparsity} must lie between 0 and 1")
    _check_dial(model)
    if per_layer is None:
        method = model.config.quantization_config.method
        per_layer = isinstance(method, LayerwiseConfig) and method.per_layer
    kept = list(batches)
    few = every_nth(kept, max(token_count(kept) // 8, FEW_TOKENS))
    small = len(few) == len(kept)
    search = _Search(model, sparsity, per_layer, progress, (1 + 2 * small) * MOVES * len(few) + 2 * len(kept))
    near = search.narrow(few, (1 + small) * MOVES, TOLERANCE if small else MISSED)
    return near if small else search.confirm(kept[::2], kept[1::2])


class _Search:
    """Of thresholds for a sparsity; see :func:`find_thresholds`."""

    def __init__(
        self, model: Any, sparsity: float, per_layer: bool, progress: Callable[[int, int], None] | None, most: int
    ) -> None:
        self.model, self.sparsity, self.per_layer = model, sparsity, per_layer
        self.progress, self.done, self.most = progress, 0, most

    def narrow(self, batches: Sequence[Mapping[str, Tensor]], moves: int, enough: float) -> OperatingPoint:
        """Move and measure until the thresholds are near enough; they are left at the best."""
        best: OperatingPoint | None = None
        error = math.inf
        aims = [self.sparsity] * (len(sparse_ffns(self.model)) if self.per_layer else 1)
        for move in range(moves + 1):
            counts = self.measure(batches)
            here = self.point(counts.sparsity_per_layer)
            missed = [reached - self.sparsity for reached in _reached(here)]
            if max(map(abs, missed)) < error and (self.per_layer or len(set(here.thresholds)) == 1):
                best, error = here, max(map(abs, missed))
            if error <= enough or move == moves:
                break
            if move:  # what the last move missed by, the next one aims off
                aims = [min(max(aim - miss, 1e-4), 1 - 1e-4) for aim, miss in zip(aims, missed, strict=True)]
            self.move(counts, aims)
        assert best is not None
        set_thresholds(self.model, best.thresholds)
        return best

    def confirm(self, half: Sequence[Mapping[str, Tensor]], rest: Sequence[Mapping[str, Tensor]]) -> OperatingPoint:
        """Measure on both halves, and on one of them once more after each of at most two moves."""
        before = self.measure(half)
        counts = before.plus(self.measure(rest))
        whole = counts.sparsity_per_layer
        best = here = self.point(whole)
        aims = [self.sparsity] * len(_reached(here))
        for _ in range(2):
            if self.error(best) <= TOLERANCE:
                break
            self.move(counts, aims)
            counts = self.measure(half)
            changed = zip(whole, counts.sparsity_per_layer, before.sparsity_per_layer, strict=True)
            there = self.point([min(max(at + new - old, 0.0), 1.0) for at, new, old in changed])
            best = min(best, there, key=self.error)
            at_half = _reached(self.point(counts.sparsity_per_layer))
            aims = [
                min(max(now - (reached - self.sparsity) / _response(old, reached, self.sparsity), 1e-4), 1 - 1e-4)
                for now, reached, old in zip(at_half, _reached(there), _reached(here), strict=True)
            ]
        set_thresholds(self.model, best.thresholds)
        return best

    def measure(self, batches: Sequence[Mapping[str, Tensor]]) -> Margins:
        def ran() -> None:
            self.done += 1
            if self.progress is not None:
                self.progress(self.done, self.most)

        return measure_margins(self.model, batches, ran, common=not self.per_layer)

    def move(self, counts: Margins, aims: Sequence[float]) -> None:
        """Put the thresholds where, by the last measurement, the aims are reached."""
        logits = [_logit(threshold) for threshold in thresholds_of(self.model)]
        if self.per_layer:
            moved = [
                at + counts.quantile_of(layer, aim) for layer, (at, aim) in enumerate(zip(logits, aims, strict=True))
            ]
        else:
            moved = [sum(logits) / len(logits) + counts.quantile(aims[0])] * len(logits)
        set_thresholds(self.model, [shifted(0.5, logit) for logit in moved])

    def point(self, sparsity_per_layer: Sequence[float]) -> OperatingPoint:
        return OperatingPoint(
            sparsity=sum(sparsity_per_layer) / len(sparsity_per_layer),
            thresholds=tuple(thresholds_of(self.model)),
            sparsity_per_layer=tuple(sparsity_per_layer),
            per_layer=self.per_layer,
        )

    def error(self, point: OperatingPoint) -> float:
        return max(abs(reached - self.sparsity) for reached in _reached(point))


def _response(before: float, after: float, wanted: float) -> float:
    """Share of a move's wanted effect that it had: layers see what those before them left out."""
    return min(max((after - before) / (wanted - before), 0.5), 2.0) if wanted != before else 1.0


def _reached(point: OperatingPoint) -> tuple[float, ...]:
    """What has to equal the sparsity asked for: that of every layer, or the mean alone."""
    return point.sparsity_per_layer if point.per_layer else (point.sparsity,)


@torch.no_grad()
def measure_margins(
    model: Any,
    batches: Iterable[Mapping[str, Tensor]],
    ran: Callable[[], None] | None = None,
    *,
    common: bool = False,
) -> Margins:
    """What the routers decide in hard mode on some batches of model inputs, padding left out.

    Args:
        model: sparse; its training mode is left as it was.
        batches: model inputs.
        ran: called after each.
        common: count from the mean of the thresholds, in logits, instead of from each layer's own.
    """
    ffns = sparse_ffns(model)
    device = next(model.parameters()).device
    margins = Margins(len(ffns), device)
    logits = [_logit(threshold) for threshold in thresholds_of(model)]
    shifts = [at - sum(logits) / len(logits) for at in logits] if common else [0.0] * len(logits)
    token_mask: Tensor | None = None
    was_training = model.training
    model.eval()
    set_mode(model, Mode.HARD)
    try:
        with (
            without_cache(model),
            observe_routing(model, lambda layer, routing: margins.add(layer, routing, token_mask, shifts[layer])),
        ):
            for batch in batches:
                inputs, token_mask = device_inputs(batch, device)
                inputs.pop("labels", None)
                body_of(model)(**inputs)
                if ran is not None:
                    ran()
    finally:
        model.train(was_training)
    if not margins.seen.all():
        raise ConfigError("the calibration data holds no tokens")
    return margins


def _logit(probability: float) -> float:
    return math.log(probability) - math.log1p(-probability)


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def shifted(threshold: float, shift: float) -> float:
    """A threshold moved by ``shift`` in logits, kept inside (0, 1)."""
    return _sigmoid(min(max(_logit(threshold) + shift, -LOGIT_RANGE), LOGIT_RANGE))
