"""What the passes of a training step say about its sparsity: what the tracker goes by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lte.activations import body_of, device_inputs, without_cache
from lte.margins import Margins
from lte.nn import Routing, observe_routing, sparse_ffns
from lte.training.losses import RoutingTotals

PROBE_TOKENS, PROBE_LENGTH = 256, 64
"""Tokens of the probe, and most of a row: several rows say more than a long one."""


class StepReading:
    """Sums over the micro-batches of one step.

    Attributes:
        active, tokens: experts that ran, as the mean over layers of their share, summed over the tokens that count.
        loss: task loss.
        push: derivative of the loss along a shift of all logits, filled by the backward pass.
        slope: that of the efficiency loss, per token of the step.
    """

    def __init__(self) -> None:
        self.active: Tensor | float = 0.0
        self.tokens: Tensor | float = 0.0
        self.loss: Tensor | float = 0.0
        self.push: Tensor | float = 0.0
        self.slope: Tensor | float = 0.0

    def count(self, task: Tensor, routings: list[Routing], totals: RoutingTotals, share: Tensor) -> None:
        """Add a micro-batch.

        Args:
            task: its task loss.
            routings: one per layer.
            totals: of them.
            share: of a token in the auxiliary losses of the step.
        """
        for routing in routings:
            if routing.margins is not None and routing.margins.requires_grad:
                routing.margins.register_hook(self._feel)
        self.active = self.active + totals.active_L.mean()
        self.tokens = self.tokens + totals.tokens
        self.loss = self.loss + task.detach().float()
        self.slope = self.slope + totals.slope * share

    def _feel(self, gradient: Tensor) -> None:
        self.push = self.push + gradient.sum(dtype=torch.float32)

    def reduce(self, accelerator: Any) -> dict[str, float]:
        """The sums over all processes; gradients are averaged over them, and so are what is derived from losses."""
        values = [
            torch.as_tensor(value, dtype=torch.float32, device=accelerator.device) for value in vars(self).values()
        ]
        sums = dict(zip(vars(self), accelerator.reduce(torch.stack(values), "sum").tolist(), strict=True))
        averaged = {name: sums[name] / accelerator.num_processes for name in ("loss", "push", "slope")}
        return {"sparsity": 1 - sums["active"] / sums["tokens"], "tokens": sums["tokens"], **averaged}


class Probe:
    """A few tokens of the training data that stay the same, run forward only, for what the weights do to the logits.

    Args:
        model: sparse, with threshold routers.
        batches: of model inputs, the same in all processes.
        accelerator: of the trainer.
    """

    def __init__(self, model: Any, batches: Iterable[Mapping[str, Tensor]], accelerator: Any) -> None:
        self.model, self.accelerator = model, accelerator
        self._batches = [
            {name: value for name, value in batch.items() if name != "labels" and isinstance(value, Tensor)}
            for batch in batches
        ]

    @torch.no_grad()
    def run(self) -> Margins:
        """Margins at the thresholds as they are, in the mode the model is in: with dropout, where steps have it."""
        device = self.accelerator.device
        margins = Margins(len(sparse_ffns(self.model)), device)
        for batch in self._batches:
            inputs, mask = device_inputs(batch, device)
            with (
                self.accelerator.autocast(),
                without_cache(self.model),
                observe_routing(self.model, partial(margins.add, token_mask=mask)),
            ):
                body_of(self.model)(**inputs)
        margins.reduce(self.accelerator)
        return margins


def first_tokens(batch: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """A batch whose rows end after so many tokens."""
    longest = batch["input_ids"].shape[1]
    return {
        name: value[:, :length] if value.ndim > 1 and value.shape[1] == longest else value
        for name, value in batch.items()
    }
