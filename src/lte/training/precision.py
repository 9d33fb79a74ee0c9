"""The optimizer for a model whose weights are bf16: one that does not lose small steps, and repeats to the bit."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import shutil
import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from lte.errors import ConfigError

logger = logging.getLogger(__name__)

ROUNDING = {str(TrainingArguments.optim): "AdamW8bit", "adamw_torch_8bit": "AdamW8bit", "adamw_torch_4bit": "AdamW4bit"}
"""``optim``, first its default -> the optimizer of torchao for bf16 weights.

By default not the one with moments in bf16: a second moment decays by a thousandth per step, less than bf16 holds, so
it stays at the largest gradients it has seen. In blocks of 8 bits it follows, as the blocks' scales are float32.
"""


def optimizer_for(args: TrainingArguments, model: Any) -> tuple[Any, dict[str, Any]]:
    """The class of optimizer, and its arguments, that these settings mean for a model.

    That of ``args.optim``, but for a model with bf16 weights: where ``optim`` was left at its default, torchao's AdamW
    with moments of 8 bits, rounding up or down at random, so that steps far below a unit in the last place arrive on
    average. ``adamw_torch_8bit`` and ``adamw_torch_4bit`` round so too, unless ``optim_args`` say otherwise. Weights in
    float32, as routers are, have moments in float32 and are rounded as usual.

    Raises:
        ConfigError: torchao is missing.
    """
    if not any(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters()):
        return Trainer.get_optimizer_cls_and_kwargs(args, model)
    check_optimizer(args)
    if args.optim == TrainingArguments.optim:
        betas = (args.adam_beta1, args.adam_beta2)
        kwargs = {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon, "bf16_stochastic_round": True}
    else:
        chosen, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if "bf16_stochastic_round" not in (args.optim_args or ""):
            kwargs["bf16_stochastic_round"] = args.optim in ROUNDING
        if not kwargs["bf16_stochastic_round"]:
            logger.warning(
                "optim=%s on bf16 weights: a step below half a unit in the last place of its weight, as most are in "
                "fine-tuning, is rounded to nothing. Leave optim out for AdamW that rounds at random, or keep the "
                "weights in float32 and train with bf16=True",
                getattr(args.optim, "value", args.optim),
            )
        if args.optim not in ROUNDING:
            del kwargs["bf16_stochastic_round"]
            return chosen, kwargs
    return _repeatable(ROUNDING[args.optim]), {**kwargs, "seed": args.seed}


def check_optimizer(args: TrainingArguments) -> None:
    """ConfigError where the optimizer for bf16 weights needs torchao, which is missing."""
    if args.optim in ROUNDING and importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            "training bf16 weights needs the package torchao, for an optimizer that does not round small steps to "
            "nothing; pip install 'learn-to-be-efficient[bf16]', keep the weights in float32, or choose an optimizer "
            "that can do without, for instance optim=adafactor"
        )


@functools.cache
def _repeatable(name: str) -> Any:
    """A class of ``torchao.optim`` whose rounding follows the run's seed and the step alone.

    So a resumed run rounds as an uninterrupted one, and every process of a distributed run rounds its copy alike,
    whatever its dropout has drawn: nothing else holds the copies together. The random state of the training goes on as
    if nothing had been drawn.
    """
    warnings.filterwarnings("ignore", message=".*does not implement _stable_hash_for_caching")
    base: Any = getattr(importlib.import_module("torchao.optim.adam"), name)

    class RoundingAdamW(base):
        def __init__(self, params: Any, seed: int = 0, **kwargs: Any) -> None:
            super().__init__(params, **kwargs)
            self._seed = seed

        def _new_buffer(self, p: Tensor, signed: bool) -> Any:
            if p.dtype == torch.float32:
                return torch.zeros_like(p)
            moment = super()._new_buffer(p, signed)
            # Of small tensors, as norms are, torchao would have the moments in bf16.
            small = type(getattr(moment, "_local_tensor", moment)) is Tensor
            return moment.float() if small else moment

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            ids = [i for group in state_dict["param_groups"] for i in group["params"]]
            parameters = [p for group in self.param_groups for p in group["params"]]
            for i, p in zip(ids, parameters, strict=True):
                for key, value in state_dict["state"].get(i, {}).items():
                    # torch has given it the dtype of the weight.
                    if key != "step" and value.dtype == torch.float32:
                        self.state[p][key] = value.detach().clone().to(p.device)

        def step(self, closure: Any = None) -> Any:
            devices = {p.device for group in self.param_groups for p in group["params"]} - {torch.device("cpu")}
            kind = next(iter(devices)).type if devices else "cpu"
            done = max((int(state["step"]) for state in self.state.values() if state), default=0)
            stance = "default" if devices or _compiler() else "force_eager"
            with (
                torch.random.fork_rng([d.index for d in devices], device_type=kind if devices else "cuda"),
                torch.compiler.set_stance(stance),
            ):
                torch.manual_seed((self._seed * 1_000_003 + done) % 2**63)
                return super().step(closure)

    RoundingAdamW.__name__ = name
    return RoundingAdamW


def _compiler() -> str | None:
    """A C++ compiler, with which torch would compile the step on the CPU; without one it runs as it stands."""
    return next(filter(None, map(shutil.which, [os.environ.get("CXX") or "g++", "clang++", "cl"])), None)
