"""Training settings: those of transformers, plus LTE's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from lte.errors import ConfigError


@dataclass
class LTETrainingArguments(TrainingArguments):
    """``transformers.TrainingArguments`` plus the two stages of LTE and their losses.

    ``learning_rate`` is the model's in stage 1; each stage has its own warm-up (``warmup_steps``) and decay.
    The length is given per stage, so ``num_train_epochs`` and ``max_steps`` are not used.

    Attributes:
        eta: coefficient of the efficiency loss; larger is sparser.
        eta_warmup: share of stage 1 over which eta rises linearly from 0.
        lambda_sep: coefficient of the separability loss.
        lambda_start, lambda_full: shares of stage 1 at which lambda begins to rise from 0, and is reached.
        sep_epsilon: added to the squared distance to the threshold in the separability loss.
        router_learning_rate: of the routers in stage 1; they are frozen in stage 2.
        router_weight_decay: of the routers.
        stage1_epochs, stage2_epochs: length of each stage in passes over the data.
        stage1_steps, stage2_steps: the same in optimiser steps; given, it replaces the epochs.
        stage1_scheduler: schedule of both learning rates in stage 1; by default ``lr_scheduler_type``, which is
            that of stage 2.
        stage2_learning_rate: of the model in stage 2; by default that of stage 1.
    """

    eta: float = 1.0
    eta_warmup: float = 0.0
    lambda_sep: float = 0.5
    lambda_start: float = 0.3
    lambda_full: float = 0.8
    sep_epsilon: float = 0.25
    router_learning_rate: float = 1e-2
    router_weight_decay: float = 0.1
    stage1_epochs: float = 1.0
    stage2_epochs: float = 1.0
    stage1_steps: int | None = None
    stage2_steps: int | None = None
    stage1_scheduler: str | None = None
    stage2_learning_rate: float | None = None
    warmup_steps: float = 0.06
    logging_nan_inf_filter: bool = False

    def __post_init__(self) -> None:
        for name in ("eta", "lambda_sep", "router_learning_rate", "router_weight_decay"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        for name in ("eta_warmup", "lambda_start", "lambda_full"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "is a share of stage 1, in [0, 1]")
        _require(
            self.sep_epsilon > 0,
            "sep_epsilon",
            self.sep_epsilon,
            "must be above 0: the loss is singular without it",
        )
        _require(self.lambda_start <= self.lambda_full, "lambda_start", self.lambda_start, "is after lambda_full")
        for name in ("stage1_epochs", "stage2_epochs", "stage1_steps", "stage2_steps"):
            value = getattr(self, name)
            _require(value is None or 0 <= value < math.inf, name, value, "must be a number, not negative")
        _require(
            self.max_steps <= 0,
            "max_steps",
            self.max_steps,
            "is not used; give stage1_steps and stage2_steps",
        )
        super().__post_init__()
        if isinstance(self.gradient_checkpointing_kwargs, dict):
            refuse_reentrant(self.gradient_checkpointing_kwargs)


def refuse_reentrant(kwargs: Mapping[str, Any]) -> None:
    """Raise ConfigError where gradient checkpointing would be reentrant."""
    if kwargs.get("use_reentrant"):
        raise ConfigError(
            "gradient checkpointing with use_reentrant=True is refused: it runs the first forward without gradients, "
            "so the auxiliary losses would not reach the routers; use {'use_reentrant': False}"
        )


def _require(condition: bool, name: str, value: Any, what: str) -> None:
    if not condition:
        raise ConfigError(f"{name}={value} {what}")
