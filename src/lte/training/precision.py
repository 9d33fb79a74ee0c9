"""Training a model whose weights are bf16: the optimizer that does not lose small steps, and rounding that repeats."""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from lte.errors import ConfigError

ROUNDING: dict[str, Any] = {"optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=True"}
"""Training arguments for bf16 weights: AdamW that rounds up or down at random, so that steps far below a unit in the
last place arrive on average. Its moments are 8-bit; parameters of other dtypes, as routers are, it rounds as usual."""


def rounding_optimizer(*, on_cpu: bool) -> dict[str, Any]:
    """:data:`ROUNDING`, or ConfigError where it cannot run."""
    otherwise = "or choose an optimizer that can do without: training.optim=..."
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            "dtype='bfloat16' needs the package torchao, for an optimizer that does not round small steps to nothing; "
            f"pip install 'learn-to-be-efficient[bf16]', {otherwise}"
        )
    if on_cpu and not any(shutil.which(name) for name in [os.environ.get("CXX") or "g++", "clang++", "cl"]):
        raise ConfigError(
            "dtype='bfloat16' needs a C++ compiler, with which torchao compiles its optimizer on the CPU; "
            f"install g++, {otherwise}"
        )
    return dict(ROUNDING)


class RepeatableRounding(TrainerCallback):
    """Draws the rounding of each step from the run's seed and the step alone.

    So every process of a distributed run rounds its copy alike, whatever its dropout has drawn: nothing else holds the
    copies together. The random state of the training goes on as if nothing had been drawn.
    """

    def __init__(self) -> None:
        self._states: list[Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the step's own random state in place."""
        self._states = [device.get_rng_state() for device in _generators(args)]
        torch.manual_seed((args.seed * 1_000_003 + state.global_step) % 2**63)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the training's random state back."""
        for device, kept in zip(_generators(args), self._states, strict=True):
            device.set_rng_state(kept)


def rounding_callbacks(args: TrainingArguments) -> list[TrainerCallback]:
    """What a run with these arguments needs beside its optimizer."""
    return [RepeatableRounding()] if args.optim in ("adamw_torch_8bit", "adamw_torch_4bit") else []


def _generators(args: TrainingArguments) -> list[Any]:
    """The modules that hold the random states in use: torch, and the accelerator's."""
    return [torch] + ([] if args.device.type == "cpu" else [torch.get_device_module(args.device)])
