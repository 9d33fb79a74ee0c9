"""What surrounds an optimiser step: the moments at which the trainer acts, and what a log record averages over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from lte.training.losses import RoutingTotals


class StepCallback(TrainerCallback, ExportableState):
    """Tells an :class:`LTETrainer` when a step begins, when its gradients are ready, and when it is over."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the tracker."""
        tracker = self.trainer.tracker
        if tracker is None:
            return {"args": {}, "attributes": {}}
        return {"args": {}, "attributes": {"tracker": tracker.state()}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A run starts or goes on."""
        self.trainer.begin()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first forward pass of a step."""
        self.trainer.enter_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are complete."""
        self.trainer.check_gradients()
        self.trainer.judge_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Weights have moved, and the schedule has not."""
        self.trainer.leave_optimizer()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step is counted."""
        self.trainer.leave_step()


class LogWindow:
    """Sums since the last log.

    Args:
        learns: whether scores do; if not, there are no losses of theirs to log.
    """

    def __init__(self, *, learns: bool) -> None:
        self.losses = ("task_loss", "efficiency_loss", "separability_loss") if learns else ("task_loss",)
        self.clear()

    def clear(self) -> None:
        """Start anew."""
        self.steps: set[int] = set()
        self.sums: dict[str, Tensor] = {}
        self.eta = 0.0

    def add(
        self,
        step: int,
        task: Tensor,
        efficiency: Tensor,
        separability: Tensor,
        eta: float,
        totals: RoutingTotals,
    ) -> None:
        """Add one micro-batch."""
        self.steps.add(step)
        self.eta = eta
        new = {
            "task_loss": task,
            "efficiency_loss": efficiency,
            "separability_loss": separability,
            "active_L": totals.active_L,
            "tokens": totals.tokens,
        }
        for name, value in new.items():
            self.sums[name] = self.sums.get(name, torch.zeros((), device=value.device)) + value.detach().float()

    def take(self, accelerator: Any) -> dict[str, float]:
        """The averages over the window, which starts anew."""
        if not self.steps:
            return {}
        steps = len(self.steps)
        sums = {name: accelerator.reduce(value, "sum") for name, value in self.sums.items()}
        share = steps * accelerator.num_processes
        record = {name: float(sums[name]) / share for name in self.losses}
        if len(self.losses) > 1:
            record["eta"] = self.eta
        sparsity_L = 1 - sums["active_L"] / sums["tokens"]
        record["sparsity"] = float(sparsity_L.mean())
        record.update({f"sparsity/layer_{i}": round(s, 4) for i, s in enumerate(sparsity_L.tolist())})
        self.clear()
        return record
