"""Small inputs of a block's projections left out: their thresholds, and who leaves out how much."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lte.activations import BlockRun, runs_of_blocks
from lte.families import blocks_of
from lte.nn import SparseFFN, Thresholded, threshold_inputs

SAMPLED = 2**22
"""Most values from which a quantile is taken."""

STEP, MOST = 0.1, 0.9
"""By which a projection's share grows, and the largest there is."""

GREEDY = 256
"""Tokens on which a block's projections are compared."""


@dataclass(frozen=True)
class Part:
    """A threshold, of one projection or of gate and up.

    Attributes:
        weights: number of weights behind it.
        watched: the module that gets the inputs.
        read: of what the module gets, the sizes that are compared with the threshold.
        set: takes the threshold, and the share that it leaves out.
    """

    weights: int
    watched: nn.Module
    read: Callable[[Tensor], Tensor]
    set: Callable[[Tensor, float], None]


def attention_parts(block: nn.Module) -> list[Part]:
    """A block's projections outside its FFN, in the order in which they run."""
    found = [module for module in block.modules() if isinstance(module, Thresholded)]
    return [Part(module.weight.numel(), module, Tensor.abs, module.leave_out) for module in found]


def threshold_attention(model: nn.Module) -> None:
    """Let the projections beside a model's sparse FFNs leave out inputs; none are left out yet."""
    for block, ffn in sparse_blocks(model):
        threshold_inputs(block, skip={id(module) for module in ffn.modules()})


@torch.no_grad()
def fit_blocks(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    parts: Callable[[nn.Module, SparseFFN], list[Part]],
    sparsity: float,
    greedy: bool,
) -> None:
    """Fit the parts of every block whose FFN is sparse, see :func:`fit_parts`, on what the blocks before it put out."""
    sparse = dict(sparse_blocks(model))
    for run in runs_of_blocks(model, blocks_of(model), batches):
        if run.block in sparse:
            fit_parts(parts(run.block, sparse[run.block]), run, sparsity, greedy)


def fit_parts(parts: Sequence[Part], run: BlockRun, sparsity: float, greedy: bool) -> None:
    """Give parts their thresholds, those that run first before the others, so that ``sparsity`` of their weights is
    left out: the same share of all, or greedily."""
    shares = divide(parts, run, sparsity) if greedy else [sparsity] * len(parts)
    for part in parts:
        part.set(torch.zeros(()), 0.0)
    for part, share in zip(parts, shares, strict=True):
        part.set(quantile(seen_by([part], run)[0], share), share)


def seen_by(parts: Sequence[Part], run: BlockRun, tokens: int | None = None) -> list[Tensor]:
    """What every threshold is compared with."""
    found: list[list[Tensor]] = [[] for _ in parts]
    with ExitStack() as stack:
        for part, values in zip(parts, found, strict=True):

            def keep(module: nn.Module, args: tuple[Tensor, ...], part: Part = part, to: list[Tensor] = values) -> None:
                to.append(run.without_padding(part.read(args[0].detach()).flatten(0, -2)))

            stack.enter_context(part.watched.register_forward_pre_hook(keep))
        run(tokens)
    return [torch.cat(values) for values in found]


def divide(parts: Sequence[Part], run: BlockRun, sparsity: float) -> list[float]:
    """The share of every part, greedily: of all, the one next whose inputs, left out in :data:`STEP` more, change the
    block's output least for what that saves. All are whole at the beginning."""
    wanted, seen = run(GREEDY), seen_by(parts, run, GREEDY)
    steps = round(MOST / STEP)
    taus = [[torch.zeros(()), *(quantile(values, STEP * step) for step in range(1, steps + 1))] for values in seen]
    at, left = [0] * len(parts), sparsity * sum(part.weights for part in parts)
    shares = [0.0] * len(parts)

    def error() -> float:
        return float((run(GREEDY) - wanted).float().square().mean())

    def costs(part: int) -> float:
        """What the next step of a part changes, for every weight that it saves."""
        parts[part].set(taus[part][at[part] + 1], 0.0)
        more = error() - before
        parts[part].set(taus[part][at[part]], 0.0)
        return more / parts[part].weights

    before = 0.0
    known = {part: costs(part) for part in range(len(parts))}
    fresh = set(known)
    while left > 0 and known:
        # What others cost has grown since, if anything: the cheapest is asked anew, until it stays the cheapest.
        while (chosen := min(known, key=known.__getitem__)) not in fresh:
            known[chosen] = costs(chosen)
            fresh.add(chosen)
        step = min(STEP, left / parts[chosen].weights)
        at[chosen] += 1
        parts[chosen].set(taus[chosen][at[chosen]], 0.0)
        if at[chosen] == steps:
            del known[chosen]
        shares[chosen] += step
        left -= step * parts[chosen].weights
        before, fresh = error(), set()
    return shares


def sparse_blocks(model: nn.Module) -> Iterator[tuple[nn.Module, SparseFFN]]:
    """The blocks whose FFN is sparse, and it."""
    for block in blocks_of(model):
        ffn = next((module for module in block.modules() if isinstance(module, SparseFFN)), None)
        if ffn is not None:
            yield block, ffn


def quantile(values: Tensor, share: float) -> Tensor:
    """What a share of the values, of any shape, does not exceed; of very many, some are asked."""
    every, step = values.float().flatten(), -(-values.numel() // SAMPLED)
    while math.gcd(step, values.shape[-1]) > 1:  # or some columns would never be seen
        step += 1
    every = every[::step]
    return every.kthvalue(max(1, min(len(every), round(share * len(every))))).values
