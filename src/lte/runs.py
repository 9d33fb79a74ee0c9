"""Training runs from a recipe to a folder: sparse (``lte train``), dense (``lte finetune``), and new models."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from lte.activations import device_inputs, sample_batches
from lte.config import MethodConfig, OperatingPoint, method_of
from lte.errors import ConfigError
from lte.evaluate import check_direction, load_for_evaluation
from lte.families import replace_activation
from lte.files import unlock_folder, write_whole
from lte.hub import default_device, is_sparse_config, load, load_dense, load_tokenizer, read_config, save_thresholds
from lte.memory import peak_memory
from lte.nn import SparsityMeter, observe_routing, sparse_ffns
from lte.recipe import Recipe, load_recipe
from lte.run_folder import (
    RUN_FILE,
    building,
    check_folder,
    claim_folder,
    finished,
    forget_replaced,
    keep_folder,
    lets_go,
    nothing_left_of,
    read_run,
)
from lte.sparsify import sparsify
from lte.tasks import PRESETS, Task, build_task
from lte.thresholds import DIAL_TOKENS, calibrate, find_thresholds
from lte.training import (
    FiniteGradients,
    JsonLinesLog,
    LTETrainer,
    LTETrainingArguments,
    StepProgress,
    StopAtSignal,
    check_checkpoint,
    correct_loss_scaling,
    last_complete_checkpoint,
    optimizer_for,
    refuse_idle_losses,
    restore_finished,
)
from lte.versions import versions

RUN_DEFAULTS: dict[str, Any] = {
    "save_steps": 0.2,
    "save_total_limit": 2,
    "logging_steps": 1,
    "disable_tqdm": False,
    "logging_nan_inf_filter": False,
    "use_cpu": not torch.accelerator.is_available(),
    "dataloader_pin_memory": torch.accelerator.is_available(),
}
"""Where a run of ours differs from the defaults of transformers; a recipe's ``training`` section wins."""


@lets_go
def train(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Make a dense model sparse and train it; ``recipe.out`` then holds the sparse model.

    Args:
        recipe: the run.
        resume: go on from the last complete checkpoint in ``recipe.out``.
        overwrite: empty ``recipe.out`` first.

    Returns:
        What is written to ``lte_run.json``.

    Raises:
        LTEError: anything the caller can mend; nothing has been changed then.
    """
    method = recipe.method()
    out = Path(recipe.out)
    args = recipe.arguments(LTETrainingArguments, output_dir=str(out / "checkpoints"), **RUN_DEFAULTS)
    _check_losses(method, args)
    if (done := finished(out, recipe, resume=resume, overwrite=overwrite)) is not None:
        return done
    check_folder(out, recipe, resume=resume, overwrite=overwrite)
    parts: dict[str, float] = {}
    began = time.perf_counter()
    tokenizer, task, rows = _read_inputs(recipe)
    # A teacher with a head nobody trained would teach noise.
    teacher = _load_dense(recipe, task, tokenizer, new_head=False) if args.distill else None
    checkpoint = _to_go_on_from(args.output_dir) if resume else None
    if checkpoint is not None:
        model = load(checkpoint, dtype=_dtype(recipe))
    else:
        model = _load_dense(recipe, task, tokenizer).to(args.device)
        parts["reading"] = time.perf_counter() - began
        seen = None
        if method_of(method).needs_calibration:
            seen = sample_batches(rows, task.collator(tokenizer), method_of(method).calibration_tokens)
        sparsify(model, method, calibration=seen, timings=parts)
    claim_folder(out, recipe, overwrite=overwrite)
    with building(out, new=not resume):
        trainer = LTETrainer(
            model=model,
            args=args,
            teacher=teacher,
            train_dataset=rows,
            data_collator=task.collator(tokenizer),
            processing_class=tokenizer,
            callbacks=[JsonLinesLog(out / "training_log.jsonl"), StopAtSignal()],
        )
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    summary = _summary(recipe, trainer.state.global_step, started, parts | trainer.seconds_of)
    if trainer.landed is not None:
        summary |= _point_sparsity(trainer.landed) | _held(trainer)
    else:
        summary |= _final_sparsity(trainer.state.log_history)
    return _save_trained(trainer, tokenizer, out, summary)


def check_recipe(recipe: Recipe, command: str) -> None:
    """ConfigError where a recipe's settings are not those of ``train``, ``sparsify`` or ``finetune``."""
    if command == "finetune":
        recipe.arguments(TrainingArguments, output_dir=recipe.out, **RUN_DEFAULTS)
    else:
        if command == "sparsify":  # trains nothing, in whatever dtype
            recipe = recipe.model_copy(update={"dtype": None})
        args = recipe.arguments(LTETrainingArguments, output_dir=recipe.out, **RUN_DEFAULTS)
        if command == "train":
            _check_losses(recipe.method(), args)


@lets_go
def make_sparse(recipe: Recipe, *, overwrite: bool = False) -> dict[str, Any]:
    """Make a dense model sparse without training it: grouping, fitted routers, thresholds for the target.

    Arguments and result are those of :func:`train`; of ``training``, only ``target_sparsity`` is used.
    """
    method, started = recipe.method(), time.perf_counter()
    target = recipe.training.get("target_sparsity")
    by_threshold = method.sparsity_is == "threshold"
    if by_threshold and (not isinstance(target, float) or not 0 < target < 1):
        raise ConfigError(
            f"target_sparsity={target} must lie between 0 and 1; give --target-sparsity, for instance 0.3"
        )
    out = Path(recipe.out)
    check_folder(out, recipe, resume=False, overwrite=overwrite)
    if recipe.dtype is None:  # nothing is trained here, so a wider copy would only take memory
        recipe = recipe.model_copy(update={"dtype": "auto"})
    tokenizer, task, rows = _read_inputs(recipe)
    model = _load_dense(recipe, task, tokenizer).to(default_device())
    collate = task.collator(tokenizer)
    parts: dict[str, float] = {"reading": time.perf_counter() - started}
    seen = sample_batches(rows, collate, method_of(method).calibration_tokens)
    sparsify(model, method, calibration=seen, timings=parts)
    searched = time.perf_counter()
    batches = sample_batches(rows, collate, method_of(method).dial_tokens)
    if by_threshold:
        reached = _point_sparsity(find_thresholds(model, batches, float(target or 0.0)))
    else:
        reached = _sparsity_on(model, batches[:1])
    parts["thresholds"] = time.perf_counter() - searched
    claim_folder(out, recipe, overwrite=overwrite)
    with nothing_left_of(out):
        summary = _save(model, tokenizer, out, _summary(recipe, 0, started, parts) | reached)
    forget_replaced(out)
    return summary


@lets_go
def finetune(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Fine-tune (or, after :func:`lte.models.create`, pre-train) a dense model: the baseline, on the same data.

    Arguments and result are those of :func:`train`; ``training`` takes fields of ``TrainingArguments``, ``sparsity``
    at most ``activation: relu``, which puts a ReLU into the dense model: what MoEfication and SparseInfer start from.
    """
    activation = recipe.dense_activation()
    out = Path(recipe.out)
    args = recipe.arguments(TrainingArguments, output_dir=str(out / "checkpoints"), warmup_steps=0.06, **RUN_DEFAULTS)
    if (done := finished(out, recipe, resume=resume, overwrite=overwrite)) is not None:
        return done
    check_folder(out, recipe, resume=resume, overwrite=overwrite)
    tokenizer, task, rows = _read_inputs(recipe)
    checkpoint = _to_go_on_from(args.output_dir) if resume else None
    model = _load_dense(recipe, task, tokenizer)
    if activation is not None:
        replace_activation(model, activation)
    claim_folder(out, recipe, overwrite=overwrite)
    with building(out, new=not resume):
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=rows,
            data_collator=task.collator(tokenizer),
            processing_class=tokenizer,
            callbacks=[
                JsonLinesLog(out / "training_log.jsonl"),
                StepProgress("dense training"),
                FiniteGradients(),
                StopAtSignal(),
            ],
            optimizer_cls_and_kwargs=optimizer_for(args, model),
        )
    correct_loss_scaling(trainer)
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    started = time.perf_counter()
    at = None if checkpoint is None else str(checkpoint)
    if not restore_finished(trainer, at):
        trainer.train(resume_from_checkpoint=at)
    return _save_trained(trainer, tokenizer, out, _summary(recipe, trainer.state.global_step, started, {}))


def calibrate_checkpoint(
    path: Path,
    data: str,
    task: Task,
    sparsities: Sequence[float],
    *,
    per_layer: bool | None = None,
    tokens: int = DIAL_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> list[OperatingPoint]:
    """Find the thresholds for some sparsities on a text, and write them into a checkpoint.

    Args:
        path: folder of a sparse model; the thresholds beside its weights, the operating points in its ``config.json``
            and the sparsity in its run file are written, at the end.
        data: the text.
        task: how to read it.
        sparsities: every one becomes an operating point; the model is left at the last.
        per_layer: the same sparsity in every layer, instead of one threshold for all; None as the method is set to.
        tokens: how much of the text is used.
        progress: called with moves of thresholds made and the most that will be.

    Returns:
        The points, in the order asked for.
    """
    if not path.is_dir():
        raise ConfigError(f"{str(path)!r} is not a folder; download a model from a hub first, then calibrate it")
    record = read_run(path)
    keep_folder(path)
    try:
        model, tokenizer = load_for_evaluation(str(path), task, dense=False)
        batches = sample_batches(task.prepare(data, tokenizer), task.collator(tokenizer), tokens)
        points = []
        for index, sparsity in enumerate(sparsities):

            def report(done: int, total: int, index: int = index) -> None:
                if progress is not None:
                    progress(index * total + done, len(sparsities) * total)

            points.append(calibrate(model, batches, sparsity, per_layer=per_layer, progress=report))
        save_thresholds(path, model)
        write_whole(path / "config.json", model.config.to_json_string())
        if record:
            record |= _point_sparsity(points[-1])
            write_whole(path / RUN_FILE, json.dumps(record, indent=2) + "\n")
        return points
    finally:
        unlock_folder(path)


def trained_task(model: str, name: str | None) -> dict[str, Any]:
    """Task settings a model of ours was trained with, for evaluating it the same way.

    Args:
        model: a folder, of ours or not.
        name: of the task wanted; None for the one it was trained for, ``lm`` where that is not known.
    """
    recipe = Path(model) / "recipe.yaml"
    if recipe.is_file():
        settings = load_recipe(recipe, {}, []).task.model_dump(exclude_defaults=True, exclude={"split", "limit"})
        if name in (None, settings["name"]):
            return settings
        if name in PRESETS and PRESETS[name].kind == settings["name"]:
            return {**settings, **PRESETS[name].expand()}
    return {"name": name or "lm"}


def _read_inputs(recipe: Recipe) -> tuple[Any, Task, Any]:
    """Tokenizer, task and training rows: all that can be wrong with the input is found before anything is written."""
    model_config = read_config(recipe.model)
    if is_sparse_config(model_config):
        raise ConfigError(f"model={recipe.model!r} is sparse already; give the dense checkpoint")
    tokenizer = load_tokenizer(recipe.model)
    task = build_task(recipe.task, model_config)
    check_direction(model_config, task)
    return tokenizer, task, task.prepare(recipe.data, tokenizer)


def _to_go_on_from(folder: str) -> Path | None:
    """The last complete checkpoint; CheckpointError where a run cannot go on from it as it was."""
    checkpoint = last_complete_checkpoint(folder)
    if checkpoint is not None:
        check_checkpoint(checkpoint)
    return checkpoint


def _dtype(recipe: Recipe) -> Any:
    return "auto" if recipe.dtype == "auto" else getattr(torch, recipe.dtype or "float32")


def _check_losses(method: MethodConfig, args: LTETrainingArguments) -> None:
    if not method_of(method).trainable:
        raise ConfigError(
            f"method={method.method!r} puts zeros into the weights, which training would fill again; train the dense "
            "model, then lte sparsify"
        )
    if not method_of(method).learns:
        refuse_idle_losses(args)


def _load_dense(recipe: Recipe, task: Task, tokenizer: Any, *, new_head: bool | None = None) -> Any:
    kwargs = task.model_kwargs(recipe.data, tokenizer)
    new_head = task.config.name == "classify" if new_head is None else new_head
    return load_dense(recipe.model, task.auto_class, new_head=new_head, dtype=_dtype(recipe), **kwargs)


def _summary(recipe: Recipe, steps: int, started: float, parts: dict[str, float]) -> dict[str, Any]:
    return {
        "recipe": recipe.model_dump(mode="json", exclude_defaults=True),
        "steps": steps,
        "seconds": round(time.perf_counter() - started, 1),
        "seconds_of": {part: round(seconds, 1) for part, seconds in parts.items()},
        "peak_memory_gb": peak_memory(),
        "versions": versions(),
    }


def _point_sparsity(point: OperatingPoint) -> dict[str, Any]:
    return {"sparsity": point.sparsity, "sparsity_per_layer": list(point.sparsity_per_layer)}


@torch.no_grad()
def _sparsity_on(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    meter, model = SparsityMeter(len(sparse_ffns(model))), model.eval()
    with observe_routing(model, meter):
        for batch in batches:
            inputs, _ = device_inputs(batch, next(model.parameters()).device)
            meter.set_token_mask(inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool())
            inputs.pop("labels", None)
            model(**inputs)
    return {"sparsity": meter.overall, "sparsity_per_layer": meter.per_layer}


def _held(trainer: LTETrainer) -> dict[str, Any]:
    """How the training kept to its target: the sparsity it ended at before the last move, and steps out of the band."""
    assert trainer.tracker is not None
    return {
        "trained_sparsity": trainer.tracker.trained,
        "task_loss": {"first": trainer.tracker.first_loss, "last": trainer.tracker.last_loss},
        "steps_out_of_band": trainer.tracker.strays,
        "on_target": trainer.on_target,
    }


def _final_sparsity(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Sparsity over the last tenth of training, as logged; nothing where no step was logged."""
    records = [record for record in history if "sparsity" in record]
    if not records:
        return {}
    last = records[-max(1, len(records) // 10) :]
    layers = sorted(
        (key for key in last[0] if key.startswith("sparsity/layer_")), key=lambda key: int(key.split("_")[1])
    )
    return {
        "sparsity": sum(record["sparsity"] for record in last) / len(last),
        "sparsity_per_layer": [sum(record[key] for record in last) / len(last) for key in layers],
    }


def _save_trained(trainer: Trainer, tokenizer: Any, out: Path, summary: dict[str, Any]) -> dict[str, Any]:
    if trainer.is_world_process_zero():
        _save(trainer.accelerator.unwrap_model(trainer.model), tokenizer, out, summary)
        forget_replaced(out)
    return summary


def _save(model: Any, tokenizer: Any, out: Path, summary: dict[str, Any]) -> dict[str, Any]:
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    write_whole(out / RUN_FILE, json.dumps(summary, indent=2) + "\n")
    return summary
