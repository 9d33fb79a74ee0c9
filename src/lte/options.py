"""Flags that several commands share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from lte.errors import ConfigError

RecipeFile = Annotated[Path | None, typer.Argument(help="YAML recipe; flags and --set win over it.")]
Set = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Any recipe key, e.g. training.eta=2.")]
Model = Annotated[str | None, typer.Option(help="Dense model: folder, hub id or .gguf file.")]
Data = Annotated[str | None, typer.Option(help="Training data: file, folder or hub name.")]
TaskName = Annotated[
    str | None, typer.Option(help="lm (text, prompt -> target, chat), classify, or a name of `lte tasks`.")
]
Out = Annotated[str | None, typer.Option(help="Folder for the result.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint in --out.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Empty --out first.")]
ContextLength = Annotated[int | None, typer.Option(help="Tokens per block, window or row.")]
PromptColumn = Annotated[str | None, typer.Option(help="Column of the prompt.")]
TargetColumn = Annotated[str | None, typer.Option(help="Column of the target; the loss is on it alone.")]
TextColumn = Annotated[str | None, typer.Option(help="Column of the text.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column of the label (classify).")]
TextPairColumn = Annotated[str | None, typer.Option(help="Column of a second text (classify).")]
MessagesColumn = Annotated[str | None, typer.Option(help="Column of a chat's messages.")]
Split = Annotated[str | None, typer.Option(help="Split of a folder or hub dataset.")]
TrainedTask = Annotated[str | None, typer.Option("--task", help="As for training; default what it was trained for.")]
Limit = Annotated[int | None, typer.Option(help="Use only the first rows.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything that is drawn.")]
LearningRate = Annotated[float | None, typer.Option(help="Learning rate of the model.")]
BatchSize = Annotated[int | None, typer.Option(help="Rows per step and device.")]


def task_settings(values: dict[str, Any]) -> dict[str, Any]:
    """What the flags say of how to read the data."""
    from lte.tasks import TaskConfig

    names = TaskConfig.model_fields.keys() - {"name"}
    return {name: value for name, value in values.items() if name in names and value is not None}


def task_as_trained(values: dict[str, Any]) -> Any:
    """The task a model was trained with, where that is known, under what the flags say."""
    from lte.runs import trained_task
    from lte.tasks import TaskConfig, build_task

    return build_task(TaskConfig(**{**trained_task(str(values["model"]), values["task"]), **task_settings(values)}))


def bits_of(text: str) -> int:
    """``int4`` -> 4; ConfigError for anything else."""
    found = re.fullmatch(r"int([1-8])", text)
    if found is None:
        raise ConfigError(f"{text!r} is no format of weights; there are int1 to int8, for instance int4")
    return int(found[1])


def common_flags(values: dict[str, Any]) -> dict[str, Any]:
    """Flags that training and fine-tuning share -> recipe keys."""
    return {
        "model": values["model"],
        "data": values["data"],
        "out": values["out"],
        "seed": values["seed"],
        "task.name": values["task"],
        **{f"task.{name}": value for name, value in task_settings(values).items()},
        "training.learning_rate": values["learning_rate"],
        "training.per_device_train_batch_size": values["batch_size"],
    }
