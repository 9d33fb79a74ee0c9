"""What the passes of a training step say about its sparsity: what the tracker goes by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lte.calibration import body_of, without_cache
from lte.margins import Margins
from lte.nn import Routing, observe_routing, sparse_ffns

PROBE_TOKENS = 512
"""Of a step, run once more after it: how far have the new weights moved their logits?"""


class StepReading:
    """Sums over the micro-batches of one step.

    Args:
        model: sparse, with threshold routers.
        device: of the step's tensors.

    Attributes:
        margins: of all decisions over the tokens that count.
        loss: task loss.
        push: derivative of the loss along a shift of all logits, filled by the backward pass.
        slope: that of the efficiency loss, filled by whoever adds it to the loss.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device
        self.margins = self._new_margins()
        self.loss: Tensor | float = 0.0
        self.push: Tensor | float = 0.0
        self.slope: Tensor | float = 0.0
        self._probe: tuple[dict[str, Tensor], Tensor, Margins] | None = None

    def count(self, task: Tensor, routings: list[Routing], token_mask: Tensor, inputs: dict[str, Any]) -> None:
        """Add a micro-batch.

        Args:
            task: its task loss.
            routings: one per layer.
            token_mask: flat, bool, True for the tokens that count.
            inputs: of the model.
        """
        if self._probe is None:
            self._probe = self._take_probe(routings, token_mask, inputs)
        for layer, routing in enumerate(routings):
            self.margins.add(layer, routing, token_mask)
            if routing.margins is not None and routing.margins.requires_grad:
                routing.margins.register_hook(self._feel)
        self.loss = self.loss + task.detach().float()

    def _feel(self, gradient: Tensor) -> None:
        self.push = self.push + gradient.sum(dtype=torch.float32)

    def _new_margins(self) -> Margins:
        return Margins(len(sparse_ffns(self.model)), self.device)

    def _take_probe(
        self, routings: list[Routing], token_mask: Tensor, inputs: dict[str, Any]
    ) -> tuple[dict[str, Tensor], Tensor, Margins]:
        """The first rows of a micro-batch, the mask of their tokens, and their margins."""
        size, length = inputs["input_ids"].shape
        rows = min(size, max(1, PROBE_TOKENS // length))
        probe = {
            name: value[:rows]
            for name, value in inputs.items()
            if name != "labels" and isinstance(value, Tensor) and value.shape[:1] == (size,)
        }
        mask = token_mask.clone()
        mask[rows * length :] = False
        before = self._new_margins()
        for layer, routing in enumerate(routings):
            before.add(layer, routing, mask)
        return probe, mask[: rows * length], before

    @torch.no_grad()
    def probe_again(self, accelerator: Any) -> tuple[Margins, Margins]:
        """Margins of the first rows before and after the weights moved, over all processes."""
        assert self._probe is not None
        probe, mask, before = self._probe
        after = self._new_margins()
        with (
            accelerator.autocast(),
            without_cache(self.model),
            observe_routing(self.model, lambda layer, routing: after.add(layer, routing, mask)),
        ):
            body_of(self.model)(**probe)
        before.reduce(accelerator)
        after.reduce(accelerator)
        return before, after
