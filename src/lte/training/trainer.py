"""``LTETrainer``: training a sparse model on top of ``transformers.Trainer``."""

from __future__ import annotations

import logging
import math
import time
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import TrainOutput

from lte.activations import sample_batches
from lte.config import OperatingPoint, method_of
from lte.errors import CheckpointError, ConfigError, NonFiniteLossError
from lte.nn import Mode, Routing, ThresholdRouter, observe_routing, set_mode, sparse_ffns, unsaid
from lte.thresholds import (
    DIAL_TOKENS,
    MISSED,
    find_thresholds,
    measure_margins,
    remember,
    set_thresholds,
    shifted,
    thresholds_of,
)
from lte.training.arguments import STAGE_LENGTHS, LTETrainingArguments, refuse_idle_losses, refuse_reentrant
from lte.training.callbacks import (
    StepProgress,
    check_checkpoint,
    gradient_norm,
    last_complete_checkpoint,
    restore_finished,
)
from lte.training.losses import RoutingTotals, total_routing
from lte.training.precision import optimizer_for
from lte.training.reading import PROBE_LENGTH, PROBE_TOKENS, Probe, StepReading, first_tokens
from lte.training.stages import StagePlan, learning_rate_factors
from lte.training.steps import LogWindow, StepCallback
from lte.training.tracker import LAST, SparsityTracker

logger = logging.getLogger(__name__)

ROUTER_WIDTH = 192
"""Width of a router's input for which ``router_learning_rate`` holds as it is."""

OPENING_TOKENS = 2048
"""Of the training data, on which the thresholds' first move is measured."""


class LTETrainer(Trainer):
    """Trains a sparsified model, its routers with it, on ``task + eta * L_eff + lambda * L_sep``.

    In one stage, experts are switched by the mask from the first step on, and the routers learn by a straight-through
    gradient (:func:`lte.nn.gates.straight_through`). With ``stages=2``, as published: stage 1 trains model and routers
    in soft mode; stage 2 freezes the routers, switches to hard mode and trains the model on the task loss alone.
    One :meth:`train` runs all of it, and every checkpoint resumes to the weights an uninterrupted run would reach.

    With ``target_sparsity`` a :class:`SparsityTracker` holds every step at the sparsity wanted of it by moving one
    threshold for all layers, and at the end that is moved by the little that is missing on rows from all over the
    training data, as the model runs without dropout. A step that leaves the band around the wanted sparsity, or whose
    task loss jumps, is warned about and made with a tenth of the learning rate.

    Logged per step, beside what transformers logs: ``task_loss``, ``stage``, ``backoff`` (factor of the learning rate),
    ``sparsity`` (of the hard mask, padding excluded), ``sparsity/layer_N``, and where scores learn ``efficiency_loss``,
    ``separability_loss`` and ``eta``.

    Args:
        model: a model after :func:`lte.sparsify`.
        args: settings.
        teacher: the dense model, for ``distill``.
        **kwargs: those of ``transformers.Trainer``.

    Raises:
        ConfigError: dense model, no teacher to distil from, a target without a threshold router, reentrant gradient
            checkpointing, or several GPUs under one process.
        NonFiniteLossError: the loss or a gradient became NaN or infinite; the last checkpoint is kept.
    """

    args: LTETrainingArguments
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self, model: Any = None, args: LTETrainingArguments | None = None, *, teacher: Any = None, **kwargs: Any
    ) -> None:
        if model is None or not sparse_ffns(model):
            raise ConfigError("LTETrainer needs a sparse model; call lte.sparsify(model, lte.LTEConfig(...)) first")
        super().__init__(model=model, args=args, **kwargs)
        if self.args.restore_callback_states_from_checkpoint:
            raise ConfigError(
                "restore_callback_states_from_checkpoint is not supported; the tracker is restored by itself"
            )
        if self.args.n_gpu > 1:
            raise ConfigError("several GPUs under one process are not supported; start with torchrun or accelerate")
        if self.args.gradient_checkpointing:
            kwargs = {"use_reentrant": False, **(self.args.gradient_checkpointing_kwargs or {})}
            self.args.gradient_checkpointing_kwargs = kwargs
            if hasattr(self.args, "activation_checkpointing_kwargs"):
                self.args.activation_checkpointing_kwargs = kwargs
        correct_loss_scaling(self)
        # The losses are scaled here, over all the tokens of an optimiser step.
        self.loss_is_scaled_for_ga = True
        for ffn in sparse_ffns(self.model):
            ffn.keep_layout = True
        self._plan: StagePlan | None = None
        self._asked_steps = self.args.max_steps
        self._step_tokens: Tensor | None = None
        self._reading: StepReading | None = None
        self._probe: Probe | None = None
        target = self.args.target_sparsity
        if target is not None and not all(ffn.router.uses_threshold for ffn in sparse_ffns(self.model)):
            raise ConfigError("target_sparsity needs routers with a threshold; a top-k router takes its own sparsity")
        learns = method_of(self.model.config.quantization_config.method).learns
        if not learns:
            refuse_idle_losses(self.args)
        self.tracker = None if target is None else SparsityTracker(target)
        self.landed: OperatingPoint | None = None
        self.seconds_of: dict[str, float] = {}
        self.teacher = self._prepare_teacher(teacher)
        self._window = LogWindow(learns=learns)
        self.add_callback(StepCallback(self))
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(StepProgress())

    @property
    def plan(self) -> StagePlan:
        """The stages, known once :meth:`train` has begun."""
        assert self._plan is not None
        return self._plan

    @unsaid()
    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Run the training, or what is left of it.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the last complete one in ``output_dir``.
            **kwargs: those of ``transformers.Trainer.train``.
        """
        batches = len(self.get_train_dataloader())
        self.args.max_steps = self._asked_steps
        self._plan = StagePlan.build(self.args, math.ceil(batches / self.args.gradient_accumulation_steps))
        if self.plan.total < 1:
            lengths = "num_train_epochs or max_steps" if self.args.stages == 1 else ", ".join(STAGE_LENGTHS)
            raise ConfigError(f"the training has no steps; give {lengths}")
        self.args.max_steps = self.plan.total
        for layer in self.model.modules():
            checkpointing = getattr(layer, "_gradient_checkpointing_func", None)
            if checkpointing is not None and getattr(layer, "gradient_checkpointing", False):
                # Left out, torch takes it as True.
                refuse_reentrant({"use_reentrant": True, **getattr(checkpointing, "keywords", {})})
        if resume_from_checkpoint is True:
            last = last_complete_checkpoint(self.args.output_dir)
            if last is None:
                raise CheckpointError(f"no complete checkpoint in {self.args.output_dir} to resume from")
            resume_from_checkpoint = str(last)
        if resume_from_checkpoint:
            check_checkpoint(resume_from_checkpoint)
        started = time.perf_counter()
        if restore_finished(self, resume_from_checkpoint, self.plan.total):
            self.begin()
            output = TrainOutput(self.state.global_step, float("nan"), {})
        else:
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self.seconds_of["training"] = time.perf_counter() - started
        set_mode(self.model, Mode.HARD)
        if self.tracker is not None:
            self._land(self.tracker)
            self.seconds_of["landing"] = time.perf_counter() - started - self.seconds_of["training"]
        return output

    @unsaid()
    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """That of transformers; nothing is said of a model's speed while it is being trained."""
        return super().evaluation_loop(*args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW (or what ``args.optim`` says) with the routers in a group of their own."""
        if self.optimizer is None:
            target = self.model if model is None else model
            routers = {
                id(parameter): self._rate_scale(parameter)
                for module in target.modules()
                if isinstance(module, ThresholdRouter)
                for parameter in module.parameters()
            }
            decayed = set(self.get_decay_parameter_names(target))
            named = [(n, p) for n, p in target.named_parameters() if p.requires_grad]
            of_model = [(n, p) for n, p in named if id(p) not in routers]
            groups = [
                {"params": [p for n, p in of_model if n in decayed], "weight_decay": self.args.weight_decay},
                {"params": [p for n, p in of_model if n not in decayed], "weight_decay": 0.0},
            ]
            for scale in sorted(set(routers.values()), reverse=True):
                groups.append(
                    {
                        "params": [p for _, p in named if routers.get(id(p)) == scale],
                        "weight_decay": self.args.router_weight_decay,
                        "lr": self.args.router_learning_rate * scale,
                    }
                )
            optimizer_class, kwargs = optimizer_for(self.args, target)
            self.optimizer = optimizer_class(groups, **kwargs)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Warm-up and decay anew in each stage; the routers' rate is 0 in stage 2."""
        if self.lr_scheduler is None:
            model_factor, router_factor = learning_rate_factors(self.args, self.plan)
            optimizer = optimizer or self.optimizer
            factors = [model_factor, model_factor] + [router_factor] * (len(optimizer.param_groups) - 2)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Fetch the micro-batches of a step, and count the tokens that the auxiliary losses average over."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            counts = [_token_mask(batch) for batch in batches]
            tokens = torch.stack([mask.sum() for mask in counts]).sum().to(device)
            self._step_tokens = self.accelerator.reduce(tokens, "sum")
        return batches, items

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Task loss plus, unless the routers are frozen, the auxiliary ones; averaged over the tokens of the step."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        routings: list[Routing] = []
        labels = inputs.get("labels")
        with observe_routing(self.model, lambda layer, routing: routings.append(routing)):
            task, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.teacher is not None:
            divergence = self._divergence(outputs, inputs, labels, num_items_in_batch)
            task = (1 - self.args.distill) * task + self.args.distill * divergence
        if not (self.model_accepts_loss_kwargs and num_items_in_batch is not None):
            task = task / self.current_gradient_accumulation_steps
        token_mask = _token_mask(inputs).flatten()
        with torch.set_grad_enabled(self.plan.stage(self.state.global_step) == 1):
            totals = total_routing(routings, token_mask, epsilon=self.args.sep_epsilon)
        if self._reading is not None:
            self._reading.count(task, routings, totals, self._share_of_a_token())
        loss = self._total_loss(task, totals)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was gathered since the last log to the record."""
        if "loss" in logs:
            logs.update(self._window.take(self.accelerator))
            logs["stage"] = self.plan.stage(self.state.global_step - 1)
            if self.tracker is not None:
                logs["backoff"] = self.tracker.factor
        super().log(logs, start_time)

    def enter_step(self) -> None:
        """Put the model into the stage of the step about to be taken."""
        step = self.state.global_step
        if self.plan.stages == 2 and step == self.plan.stage1_steps:
            # Adam's moments belong to the soft-mode loss; a checkpoint of this very step resumes the same way.
            self.optimizer.state.clear()
        set_mode(self.model, self.plan.mode(step))
        for ffn in sparse_ffns(self.model):
            ffn.hardness = self.plan.hardness(step)
        self._reading = None if self.tracker is None else StepReading()

    def judge_step(self) -> None:
        """Let the tracker see what the step measured, before the weights move: they move less if it went wrong."""
        tracker, probe = self.tracker, self._probe
        if tracker is None or probe is None or self._reading is None:
            return
        step, found = self.state.global_step, self._reading.reduce(self.accelerator)
        scale = 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()
        tokens = found["tokens"]
        tracker.feel(found["push"] / scale, found["slope"], tokens)
        wrong = tracker.judge(found["sparsity"], found["loss"], self._target_ramp(step), tokens)
        if step + 1 > (1 - LAST) * self.plan.total:
            tracker.keep_last(found["loss"], tokens)
        if wrong:
            logger.warning("step %d went wrong: %s; its learning rate is cut to a tenth", step + 1, wrong)
        if tracker.factor < 1:
            for group in self.optimizer.param_groups:
                group["lr"] = group["lr"] * tracker.factor
        if not tracker.waited:
            tracker.look(probe.run())
        tracker.pass_step(tokens)

    def leave_optimizer(self) -> None:
        """Give the next step its learning rate back."""
        if self.tracker is not None and self.tracker.factor < 1:
            for group in self.optimizer.param_groups:
                group["lr"] = group["lr"] / self.tracker.factor

    def leave_step(self) -> None:
        """Move the thresholds for the next step, if it is time to."""
        if self.tracker is None or self._probe is None or not self.tracker.is_due:
            return
        shift = self.tracker.move(self._probe.run(), self._target_ramp(self.state.global_step))
        set_thresholds(self.model, [shifted(threshold, shift) for threshold in thresholds_of(self.model)])

    def begin(self) -> None:
        """Give the tracker the state of the checkpoint a resumed run starts from, or a start it can work from.

        Routers that start sparser than the target would have the model learn to do without what it may keep, so
        thresholds are lowered first.
        """
        self.model.config.quantization_config.operating_points = []
        if self.tracker is None:
            return
        self.tracker = SparsityTracker(self.tracker.target)
        self._probe = Probe(self.model, self._sample(PROBE_TOKENS, longest=PROBE_LENGTH), self.accelerator)
        saved = (self.state.stateful_callbacks or {}).get(StepCallback.__name__)
        if self.state.global_step and isinstance(saved, dict) and "tracker" in saved["attributes"]:
            self.tracker.restore(saved["attributes"]["tracker"])
            return
        batches = self._sample(OPENING_TOKENS)
        opening = measure_margins(self.model, batches).sparsity
        self.tracker.compare(self._probe.run().sparsity, opening)
        if opening > self.tracker.target:
            find_thresholds(self.model, batches, self.tracker.target, per_layer=False)

    def check_gradients(self) -> None:
        """Raise NonFiniteLossError before a step that would spoil the weights."""
        if self.accelerator.scaler is not None:
            return
        norm = gradient_norm(self.model)
        if not torch.isfinite(norm):
            raise self._non_finite(f"the gradient norm is {float(norm)}")

    def _routers_frozen(self, step: int) -> bool:
        return self.plan.stage(step) == 2 or self.args.router_learning_rate == 0

    def _rate_scale(self, parameter: Tensor) -> float:
        """Of the routers' learning rate: Adam moves a logit by the rate times the width, whatever the gradient."""
        if self.args.stages == 2 or parameter.ndim < 2:
            return 1.0
        return ROUTER_WIDTH / max(parameter.shape[1], 1)

    def _target_ramp(self, step: int) -> float:
        return self.plan.ramp(step, 0.0, self.args.target_warmup)

    def _prepare_teacher(self, teacher: Any) -> Any:
        if not self.args.distill:
            return None
        if teacher is None or sparse_ffns(teacher):
            raise ConfigError(
                f"distill={self.args.distill} needs the dense model, a copy of its own: LTETrainer(..., teacher=model)"
            )
        if getattr(teacher.config, "problem_type", None) == "regression" or (
            "Classification" in type(teacher).__name__ and teacher.config.num_labels == 1
        ):
            raise ConfigError(f"distill={self.args.distill} needs predicted probabilities; this model has one output")
        return teacher.requires_grad_(False).eval().to(self.args.device)

    def _divergence(
        self, outputs: Any, inputs: dict[str, Any], labels: Tensor | None, num_items_in_batch: Any
    ) -> Tensor:
        """KL divergence from the dense model's predictions, averaged as the task loss is."""
        with torch.no_grad(), self.accelerator.autocast():
            wanted = self.teacher(**{key: value for key, value in inputs.items() if key != "labels"}).logits
        found = outputs.logits
        if found.dim() == 3 and labels is not None:
            learned = labels[:, 1:] != -100
            found, wanted = found[:, :-1][learned], wanted[:, :-1][learned]
        loss = torch.nn.functional.kl_div(
            found.float().log_softmax(-1), wanted.float().log_softmax(-1), log_target=True, reduction="none"
        ).sum(-1)
        if not (self.model_accepts_loss_kwargs and num_items_in_batch is not None):
            return loss.mean()
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return loss.sum() * processes / num_items_in_batch

    @torch.no_grad()
    def _land(self, tracker: SparsityTracker) -> None:
        """Move the thresholds by what is left, measured as inference will run: without dropout."""
        target = tracker.target
        batches = self._sample(DIAL_TOKENS)
        self.landed = find_thresholds(self.model, batches, target, per_layer=False)
        remember(self.model, self.landed)
        if abs(self.landed.sparsity - target) > MISSED:
            logger.warning("target_sparsity=%s was not reached: the model is at %.3f", target, self.landed.sparsity)
        if not tracker.on_target:
            logger.warning(
                "the model was not trained at target_sparsity=%s but, over the last steps, at %.3f; its quality is not "
                "what training can give. Train for longer, or with a lower learning_rate",
                target,
                tracker.trained if tracker.trained is not None else float("nan"),
            )

    @property
    def on_target(self) -> bool:
        """Whether the model was trained at its target, and its thresholds then found for it; True without a target."""
        if self.tracker is None or self.landed is None:
            return self.tracker is None
        return self.tracker.on_target and abs(self.landed.sparsity - self.tracker.target) <= MISSED

    def _sample(self, tokens: int, *, longest: int | None = None) -> list[Any]:
        """Batches of rows, or of their first tokens, from all over the training data; the same in every process."""
        rows, collate = self.train_dataset, self.data_collator
        if isinstance(rows, Dataset):
            rows = self._remove_unused_columns(rows, "training")
        else:
            collate = self._get_collator_with_removed_columns(collate, "training")
        if longest is not None:
            collate = partial(_collate_first, collate, longest)
        return sample_batches(rows, collate, tokens)

    def _share_of_a_token(self) -> Tensor:
        """In the auxiliary losses: gradients are averaged over processes, while the token count is of all of them."""
        assert self._step_tokens is not None
        return self.accelerator.num_processes / self._step_tokens

    def _total_loss(self, task: Tensor, totals: RoutingTotals) -> Tensor:
        step, args = self.state.global_step, self.args
        share = self._share_of_a_token()
        efficiency, separability = totals.efficiency * share, totals.separability * share
        if self._routers_frozen(step):
            eta = 0.0
        elif self.tracker is None:
            eta = (args.eta or 0.0) * self.plan.ramp(step, 0.0, args.eta_warmup)
        else:
            eta = self.tracker.price
        lambda_sep = args.lambda_sep * self.plan.ramp(step, args.lambda_start, args.lambda_full)
        if self.plan.stage(step) == 1:
            loss = task + eta * efficiency + lambda_sep * separability
        elif self.accelerator.num_processes > 1:
            # DistributedDataParallel waits for a gradient of every parameter, the frozen routers' too.
            loss = task + 0.0 * sum(p.sum() for ffn in sparse_ffns(self.model) for p in ffn.router.parameters())
        else:
            loss = task
        if not torch.isfinite(loss):
            terms = {"task loss": task, "efficiency": efficiency, "separability": separability}
            raise self._non_finite(", ".join(f"{name} {value.item():.4g}" for name, value in terms.items()))
        self._window.add(step, task, efficiency, separability, eta, totals)
        return loss

    def _non_finite(self, what: str) -> NonFiniteLossError:
        step = self.state.global_step
        last = last_complete_checkpoint(self.args.output_dir)
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint had been saved yet"
        return NonFiniteLossError(
            f"training stopped at step {step + 1} (stage {self.plan.stage(step)}): {what}; {kept}. "
            "Lower learning_rate or router_learning_rate, or train in bf16 instead of fp16"
        )


def correct_loss_scaling(trainer: Trainer) -> None:
    """Make a trainer average a classification loss over the micro-batches of a step.

    transformers takes every model whose forward has ``**kwargs`` for one whose loss is normalised by
    ``num_items_in_batch``; the classification losses of BERT and others are plain means, so that under gradient
    accumulation they came out too large by the number of micro-batches.
    """
    if type(trainer.model).__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        trainer.model_accepts_loss_kwargs = False


def _collate_first(collate: Any, length: int, rows: list[Any]) -> dict[str, Tensor]:
    return first_tokens(collate(rows), length)


def _token_mask(inputs: dict[str, Any]) -> Tensor:
    """Bool mask of the real tokens of a batch."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
