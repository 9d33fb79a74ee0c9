"""Training settings: those of transformers, plus LTE's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from lte.errors import LAST_SEED, ConfigError

PAPER: dict[str, Any] = {"stages": 2, "lambda_sep": 0.5, "router_learning_rate": 1e-2}
"""What :class:`LTETrainingArguments` needs to train as the paper does (``--preset paper``)."""


@dataclass
class LTETrainingArguments(TrainingArguments):
    """``transformers.TrainingArguments`` plus how a sparse model is trained.

    By default in one stage, as long as any fine-tuning: experts are switched by the mask from the first step on and
    routers learn by a straight-through gradient. ``stages=2`` is the published training: soft, then hard with the
    routers frozen; each stage has its own length, warm-up and decay.

    Attributes:
        target_sparsity: share of FFN neurons not to be used. Thresholds hold it, and the efficiency loss gets the
            weight at which it only chooses among experts (:class:`lte.training.SparsityTracker`).
        target_warmup: share of the training (of stage 1) over which the target rises from the sparsity
            the model starts with.
        eta: instead of a target, a fixed weight of the efficiency loss; larger is sparser.
        eta_warmup: share of the training (of stage 1) over which eta rises linearly from 0.
        stages: 1 or 2.
        anneal: share of a one-stage training over which the gate goes from the scores to the mask; 0 is the mask
            from the start.
        distill: share of the task loss replaced by the KL divergence from the dense model's predictions.
        lambda_sep: coefficient of the separability loss.
        lambda_start, lambda_full: shares of the training (of stage 1) at which lambda begins to rise from 0, and is
            reached.
        sep_epsilon: added to the squared distance to the threshold in the separability loss.
        router_learning_rate: of the routers; in a single stage, that of weights on inputs of width D is multiplied by
            ``192 / D``. They are frozen in stage 2.
        router_weight_decay: of the routers.
        stage1_epochs, stage2_epochs: with ``stages=2``, length of each stage in passes over the data, 1 by default.
        stage1_steps, stage2_steps: the same in optimiser steps; given, it replaces the epochs.
        stage1_scheduler: schedule of both learning rates in stage 1; by default ``lr_scheduler_type``, which is
            that of stage 2.
        stage2_learning_rate: of the model in stage 2; by default that of stage 1.
    """

    target_sparsity: float | None = None
    target_warmup: float = 0.1
    eta: float | None = None
    eta_warmup: float = 0.0
    stages: int = 1
    anneal: float = 0.0
    distill: float = 0.0
    lambda_sep: float = 0.0
    lambda_start: float = 0.3
    lambda_full: float = 0.8
    sep_epsilon: float = 0.25
    router_learning_rate: float = 1e-3
    router_weight_decay: float = 0.1
    stage1_epochs: float | None = None
    stage2_epochs: float | None = None
    stage1_steps: int | None = None
    stage2_steps: int | None = None
    stage1_scheduler: str | None = None
    stage2_learning_rate: float | None = None
    warmup_steps: float = 0.06
    logging_nan_inf_filter: bool = False

    def __post_init__(self) -> None:
        target = self.target_sparsity
        _require(target is None or 0 < target < 1, "target_sparsity", target, "must lie between 0 and 1")
        if (target is None) == (self.eta is None):
            raise ConfigError(
                f"target_sparsity={target} and eta={self.eta}: give one of the two, for instance target_sparsity=0.7"
            )
        _require(self.stages in (1, 2), "stages", self.stages, "must be 1, or 2 for the published training")
        check_ranges(self)
        _require(
            not self.use_liger_kernel,
            "use_liger_kernel",
            True,
            "would put dense FFNs where the sparse ones are; leave it out",
        )
        for name in ("target_warmup", "eta_warmup", "anneal", "distill", "lambda_start", "lambda_full"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "is a share, in [0, 1]")
        _require(
            self.sep_epsilon > 0,
            "sep_epsilon",
            self.sep_epsilon,
            "must be above 0: the loss is singular without it",
        )
        _require(self.lambda_start <= self.lambda_full, "lambda_start", self.lambda_start, "is after lambda_full")
        for name in STAGE_LENGTHS:
            value = getattr(self, name)
            _require(value is None or 0 <= value < math.inf, name, value, "must be a number, not negative")
            if self.stages == 1:
                _require(value is None, name, value, "needs stages=2; one stage takes num_train_epochs or max_steps")
        if self.stages == 2:
            _require(
                self.max_steps <= 0, "max_steps", self.max_steps, "needs stages=1; give stage1_steps, stage2_steps"
            )
            _require(self.anneal == 0, "anneal", self.anneal, "needs stages=1; stage 1 is soft throughout")
        super().__post_init__()
        if isinstance(self.gradient_checkpointing_kwargs, dict):
            refuse_reentrant(self.gradient_checkpointing_kwargs)


NOT_NEGATIVE = (
    *("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "adam_epsilon", "dataloader_num_workers"),
    *("eta", "lambda_sep", "router_learning_rate", "router_weight_decay", "stage2_learning_rate"),
)
AT_LEAST_ONE = ("per_device_train_batch_size", "gradient_accumulation_steps", "save_total_limit")


def check_ranges(args: TrainingArguments) -> None:
    """ConfigError for numbers that transformers would stumble over, or not, once a run has begun."""

    def require(names: Iterable[str], fits: Callable[[Any], bool], what: str) -> None:
        for name in names:
            value = getattr(args, name, None)
            if value is not None and not fits(value):
                raise ConfigError(f"training.{name}={value} {what}")

    require(NOT_NEGATIVE, lambda value: 0 <= value < math.inf, "must not be negative")
    require(AT_LEAST_ONE, lambda value: value >= 1, "must be at least 1")
    require(("num_train_epochs", "save_steps", "logging_steps"), lambda value: 0 < value < math.inf, "must be above 0")
    require(("label_smoothing_factor",), lambda value: 0 <= value < 1, "must be in [0, 1)")
    require(("neftune_noise_alpha", "ddp_timeout"), lambda value: value > 0, "must be above 0")
    orders = ("random", "sequential", "group_by_length")
    require(("train_sampling_strategy",), lambda value: value in orders, f"must be one of {', '.join(orders)}")
    require(("adam_beta1", "adam_beta2"), lambda value: 0 <= value < 1, "must be in [0, 1)")
    require(("max_steps",), lambda value: value == -1 or value >= 1, "must be at least 1, or -1 for whole epochs")
    require(("seed", "data_seed"), lambda value: 0 <= value <= LAST_SEED, f"must be from 0 to {LAST_SEED}")


def refuse_idle_losses(args: LTETrainingArguments) -> None:
    """Raise ConfigError where losses on the scores are asked for; called where scores do not learn."""
    for name in ("eta", "lambda_sep"):
        if value := getattr(args, name):
            raise ConfigError(
                f"{name}={value} acts on the scores, and nothing learns from these; give --target-sparsity alone, or "
                "let them learn (sparsity.learned=true), or learn routers (sparsity.method=lte)"
            )


STAGE_LENGTHS = ("stage1_epochs", "stage2_epochs", "stage1_steps", "stage2_steps")


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
