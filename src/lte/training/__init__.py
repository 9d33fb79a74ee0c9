"""Losses, stages and the trainer."""

from lte.training.arguments import PAPER, LTETrainingArguments, check_ranges, refuse_idle_losses
from lte.training.callbacks import (
    FiniteGradients,
    JsonLinesLog,
    StepProgress,
    check_checkpoint,
    last_complete_checkpoint,
    restore_finished,
)
from lte.training.losses import efficiency_loss, separability_loss
from lte.training.precision import check_optimizer, optimizer_for
from lte.training.stopping import StopAtSignal, Terminated, termination
from lte.training.tracker import SparsityTracker
from lte.training.trainer import LTETrainer, correct_loss_scaling

__all__ = [
    "PAPER",
    "FiniteGradients",
    "JsonLinesLog",
    "LTETrainer",
    "LTETrainingArguments",
    "SparsityTracker",
    "StepProgress",
    "StopAtSignal",
    "Terminated",
    "check_checkpoint",
    "check_optimizer",
    "check_ranges",
    "correct_loss_scaling",
    "efficiency_loss",
    "last_complete_checkpoint",
    "optimizer_for",
    "refuse_idle_losses",
    "restore_finished",
    "separability_loss",
    "termination",
]
