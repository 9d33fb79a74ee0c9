"""Losses, stages and the trainer."""

from lte.training.arguments import LTETrainingArguments
from lte.training.callbacks import JsonLinesLog, StepProgress
from lte.training.losses import efficiency_loss, separability_loss
from lte.training.trainer import LTETrainer, correct_loss_scaling, last_complete_checkpoint

__all__ = [
    "JsonLinesLog",
    "LTETrainer",
    "LTETrainingArguments",
    "StepProgress",
    "correct_loss_scaling",
    "efficiency_loss",
    "last_complete_checkpoint",
    "separability_loss",
]
