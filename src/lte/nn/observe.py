"""Watching what the routers of a model decide: one accounting of sparsity for training, evaluation and figures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lte.nn.ffn import Mode, RoutingObserver, SparseFFN
from lte.nn.routing import Routing


def sparse_ffns(model: nn.Module) -> list[SparseFFN]:
    """The sparse FFNs of a model, in layer order; empty for a dense model."""
    found = [module for module in model.modules() if isinstance(module, SparseFFN)]
    return sorted(found, key=lambda ffn: ffn.layer_index)


def set_mode(model: nn.Module, mode: Mode | str) -> None:
    """Put every sparse FFN of a model into ``dense``, ``soft``, ``hard`` or ``straight-through`` mode."""
    for ffn in sparse_ffns(model):
        ffn.mode = Mode(mode)


@contextmanager
def observe_routing(model: nn.Module, observer: RoutingObserver) -> Iterator[None]:
    """Call ``observer(layer, routing)`` for every sparse FFN that runs inside the block.

    The observer is taken away when the block ends, so that a forward recomputed in the backward pass (gradient
    checkpointing) is not counted twice.
    """
    ffns = sparse_ffns(model)
    for ffn in ffns:
        ffn.observer = observer
    try:
        yield
    finally:
        for ffn in ffns:
            ffn.observer = None


class SparsityMeter:
    """Counts the experts that ran, per layer, over the tokens that count.

    Sparsity is the share of FFN neurons not used; experts being equally large, it is the share of experts.

    Args:
        n_layers: number of sparse FFNs.
        bins: number of score histogram bins per layer; 0 keeps no histogram.
    """

    def __init__(self, n_layers: int, bins: int = 0) -> None:
        self.bins = bins
        self.active = torch.zeros(n_layers, dtype=torch.float64)
        self.seen = torch.zeros(n_layers, dtype=torch.float64)
        self.histogram = torch.zeros(n_layers, bins, dtype=torch.float64)
        self._token_mask: Tensor | bool | None = False

    def set_token_mask(self, mask_BS: Tensor | bool | None) -> None:
        """Say which tokens of the forwards to come count: [B, S] bool; None for all of them, False for none."""
        self._token_mask = mask_BS

    @torch.no_grad()
    def __call__(self, layer: int, routing: Routing) -> None:
        """Observe one routing; see :func:`observe_routing`."""
        if self._token_mask is False:
            return
        counted: Any = slice(None)
        if isinstance(self._token_mask, Tensor):
            counted = self._token_mask.reshape(-1).to(routing.mask.device)
        shares_TE = routing.shares.flatten(0, -2)[counted]
        self.active[layer] += shares_TE.sum().cpu()
        self.seen[layer] += shares_TE.numel()
        if self.bins:
            scores = routing.scores.flatten(0, -2)[counted].float().cpu()
            self.histogram[layer] += torch.histc(scores, self.bins, 0.0, 1.0)

    @property
    def per_layer(self) -> list[float]:
        """Sparsity of each layer; NaN where nothing was seen."""
        return (1 - self.active / self.seen).tolist()

    @property
    def overall(self) -> float:
        """Sparsity over all layers and tokens."""
        return float(1 - self.active.sum() / self.seen.sum())
