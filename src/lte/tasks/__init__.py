"""Tasks: where rows come from, how they become training rows, and how a model is measured on them."""

from typing import Any

from lte.tasks.base import Progress, SetTokenMask, Task, TaskResult
from lte.tasks.classify import ClassifyTask
from lte.tasks.config import TaskConfig, fit_context, model_positions
from lte.tasks.language import LanguageTask
from lte.tasks.presets import PRESETS, Preset
from lte.tasks.sources import Source, load_rows

__all__ = [
    "PRESETS",
    "ClassifyTask",
    "LanguageTask",
    "Preset",
    "Progress",
    "SetTokenMask",
    "Source",
    "Task",
    "TaskConfig",
    "TaskResult",
    "build_task",
    "fit_context",
    "load_rows",
    "model_positions",
]

_TASKS: dict[str, type[Task]] = {"lm": LanguageTask, "classify": ClassifyTask}


def build_task(config: TaskConfig, model_config: Any = None) -> Task:
    """The task a config describes.

    Args:
        config: of the task.
        model_config: of the model to be trained or measured; given, the context is clipped to its positions.
    """
    if model_config is not None:
        config = fit_context(config, model_config)
    return _TASKS[config.name](config)
