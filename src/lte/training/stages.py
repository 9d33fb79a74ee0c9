"""What holds at each step of a training, as a function of the step: a resumed run needs no state for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import get_scheduler

from lte.nn import Mode
from lte.training.arguments import LTETrainingArguments


@dataclass(frozen=True)
class StagePlan:
    """How many optimiser steps each stage takes, and what holds at a given step.

    Attributes:
        stage1_steps, stage2_steps: lengths in optimiser steps; a training in one stage has no second.
        stages: 1 or 2.
        anneal: see :class:`LTETrainingArguments`.
    """

    stage1_steps: int
    stage2_steps: int
    stages: int = 2
    anneal: float = 0.0

    @classmethod
    def build(cls, args: LTETrainingArguments, steps_per_epoch: int) -> StagePlan:
        """From the arguments and the number of optimiser steps in one pass over the data."""

        def length(steps: int | None, epochs: float | None) -> int:
            return math.ceil((1.0 if epochs is None else epochs) * steps_per_epoch) if steps is None else steps

        if args.stages == 1:
            steps = length(args.max_steps if args.max_steps > 0 else None, args.num_train_epochs)
            return cls(steps, 0, stages=1, anneal=args.anneal)
        return cls(length(args.stage1_steps, args.stage1_epochs), length(args.stage2_steps, args.stage2_epochs))

    @property
    def total(self) -> int:
        """Steps of both stages."""
        return self.stage1_steps + self.stage2_steps

    def stage(self, step: int) -> int:
        """1 or 2, for the step about to be taken (counted from 0)."""
        return 1 if self.stages == 1 or step < self.stage1_steps else 2

    def mode(self, step: int) -> Mode:
        """Soft in stage 1, hard in stage 2 (LTE, section 4.3); straight-through in a single stage."""
        if self.stages == 1:
            return Mode.STRAIGHT_THROUGH
        return Mode.SOFT if self.stage(step) == 1 else Mode.HARD

    def hardness(self, step: int) -> float:
        """How far the gate is from the scores (0) to the mask (1), in a single stage."""
        return self.ramp(step, 0.0, self.anneal)

    def ramp(self, step: int, start: float, full: float) -> float:
        """0 up to the share ``start`` of stage 1, 1 from the share ``full`` on, linear between."""
        progress = (step + 1) / max(self.stage1_steps, 1)
        return 1.0 if progress >= full else max(0.0, (progress - start) / (full - start))


def learning_rate_factors(
    args: LTETrainingArguments, plan: StagePlan
) -> tuple[Callable[[int], float], Callable[[int], float]]:
    """Multipliers of ``learning_rate`` for the model and of ``router_learning_rate`` for the routers, by step."""
    first = _schedule(args, args.stage1_scheduler or args.lr_scheduler_type, plan.stage1_steps)
    second = _schedule(args, args.lr_scheduler_type, plan.stage2_steps)
    rate2 = args.learning_rate if args.stage2_learning_rate is None else args.stage2_learning_rate
    ratio = rate2 / args.learning_rate if args.learning_rate else 0.0

    def model_factor(step: int) -> float:
        return first(step) if plan.stage(step) == 1 else ratio * second(step - plan.stage1_steps)

    def router_factor(step: int) -> float:
        return first(step) if plan.stage(step) == 1 else 0.0

    return model_factor, router_factor


def _schedule(args: LTETrainingArguments, name: str, steps: int) -> Callable[[int], float]:
    """The named schedule of transformers as a plain function of the step."""
    probe = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = get_scheduler(
        name,
        probe,
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=max(steps, 1),
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factor
