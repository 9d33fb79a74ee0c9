"""How far decisions lie from a threshold, counted in bins that widen with the distance: no scale has to be known."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lte.nn import Routing

FINEST, REACH, BINS = 1e-6, 24.0, 4096
"""Width in logits up to which bins are linear; asinh of the largest distance counted, in such widths; their number.
Beyond the finest, a bin is 1.2 % as wide as it is far away."""

COUNTED = 2**18
"""Most decisions of one layer and forward that enter the histogram, evenly spaced ones; sparsity counts all."""


class Margins:
    """Counts the margins (logits less their threshold) of all decisions, per layer, over the tokens that count.

    Histograms of batches, and of processes, add up: :attr:`counts` and :attr:`active` are sums.

    Args:
        n_layers: number of sparse FFNs.
        device: of the counts.
    """

    def __init__(self, n_layers: int, device: torch.device | str = "cpu") -> None:
        device = "cpu" if torch.device(device).type == "mps" else device  # float64 is not everywhere
        self.counts = torch.zeros(n_layers, BINS, dtype=torch.float64, device=device)
        self.active = torch.zeros(n_layers, dtype=torch.float64, device=device)
        self.seen = torch.zeros(n_layers, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, layer: int, routing: Routing, token_mask: Tensor | None = None, shift: float = 0.0) -> None:
        """Count one forward of one layer.

        Args:
            layer: its index.
            routing: with margins.
            token_mask: flat, bool, True for the tokens that count; None counts all.
            shift: added to the margins.
        """
        assert routing.margins is not None
        margins_TE, mask_TE = routing.margins.detach().flatten(0, -2), routing.mask.flatten(0, -2)
        counts_TE = torch.ones_like(mask_TE) if token_mask is None else token_mask[:, None].expand_as(mask_TE)
        self.active[layer] += (mask_TE & counts_TE).sum()
        self.seen[layer] += counts_TE.sum()
        # An odd step meets all experts in turn, whatever power of two their number is.
        step = margins_TE.numel() // COUNTED | 1
        every, counted = margins_TE.flatten()[::step], counts_TE.flatten()[::step]
        places = torch.asinh((every.float() + shift) / FINEST).clamp(-REACH, REACH)
        # What lies beyond the last bin is in none of them. Picking by a mask would wait for the GPU instead.
        places = places.masked_fill(~counted, 2 * REACH)
        share = counts_TE.sum() / counted.sum().clamp(min=1)
        self.counts[layer] += share * torch.histc(places, BINS, -REACH, REACH)

    def reduce(self, accelerator: Any) -> None:
        """Sum the counts over all processes, in place."""
        for name in ("counts", "active", "seen"):
            setattr(self, name, accelerator.reduce(getattr(self, name), "sum"))

    def plus(self, other: Margins) -> Margins:
        """The counts of both."""
        total = Margins(len(self.seen), self.seen.device)
        for name in ("counts", "active", "seen"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    @property
    def sparsity_per_layer(self) -> list[float]:
        """Share of the experts that did not run."""
        return (1 - self.active / self.seen).tolist()

    @property
    def sparsity(self) -> float:
        """Over all layers."""
        return float((1 - self.active / self.seen).mean())

    def quantile(self, share: float) -> float:
        """The margin below which a share of all decisions lies, every layer counting the same."""
        return _quantile((self.counts / self.seen[:, None]).mean(0), share)

    def share_below(self, margin: float) -> float:
        """The share of all decisions whose margin is smaller, every layer counting the same."""
        histogram = (self.counts / self.seen[:, None]).mean(0)
        place = (math.asinh(margin / FINEST) + REACH) * BINS / (2 * REACH)
        index = min(max(int(place), 0), BINS - 1)
        inside = min(max(place - index, 0.0), 1.0)
        return float((histogram[:index].sum() + inside * histogram[index]) / histogram.sum())

    def quantile_of(self, layer: int, share: float) -> float:
        """The same of one layer."""
        return _quantile(self.counts[layer] / self.seen[layer], share)


def _quantile(histogram: Tensor, share: float) -> float:
    """Linear inside a bin."""
    histogram = histogram.cpu()
    cumulated = histogram.cumsum(0)
    wanted = min(max(share, 0.0), 1.0) * cumulated[-1]
    index = int(torch.searchsorted(cumulated, wanted).clamp(max=BINS - 1))
    before = float(cumulated[index - 1]) if index else 0.0
    inside = (float(wanted) - before) / max(float(histogram[index]), 1e-12)
    place = -REACH + 2 * REACH * (index + min(max(inside, 0.0), 1.0)) / BINS
    return float(torch.sinh(torch.tensor(place, dtype=torch.float64))) * FINEST
