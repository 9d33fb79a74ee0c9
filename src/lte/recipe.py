"""A recipe: everything a training run needs, as one YAML file or as flags, with unknown keys refused."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml
from transformers import TrainingArguments

from lte.config import MethodConfig, method_config, validate_model
from lte.errors import ConfigError
from lte.tasks import TaskConfig


class Recipe(pydantic.BaseModel):
    """One training run.

    Attributes:
        model: folder or hub id of the dense model.
        data: file, folder or hub name of the training data.
        out: folder the model is written to.
        task: see :class:`lte.tasks.TaskConfig`.
        sparsity: ``method`` (default ``lte``) and that method's settings, see :class:`lte.LTEConfig`.
        training: fields of :class:`lte.LTETrainingArguments` (of ``transformers.TrainingArguments`` for a dense
            run).
        seed: of grouping, routers, data order and dropout.
        dtype: of the weights while training; ``auto`` takes the checkpoint's.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    model: str
    data: str
    out: str
    task: TaskConfig
    sparsity: dict[str, Any] = {}
    training: dict[str, Any] = {}
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"

    def method(self) -> MethodConfig:
        """The sparsity method's config."""
        values = {"seed": self.seed, **self.sparsity}
        return method_config(values.pop("method", "lte"), values)

    def arguments(self, cls: type[TrainingArguments], **defaults: Any) -> Any:
        """The training arguments, of class ``cls``; ``defaults`` yield to the recipe."""
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
        values = {"seed": self.seed, **defaults}
        for key, value in self.training.items():
            if key not in fields or key == "output_dir":
                near = difflib.get_close_matches(key, [name for name in fields if name != "output_dir"], n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"unknown recipe key 'training.{key}'{hint}")
            values[key] = _as_number(value, f"training.{key}") if "float" in str(fields[key].type) else value
        try:
            return cls(**values)
        except ConfigError:
            raise
        except (TypeError, ValueError) as error:
            raise ConfigError(f"training: {error}") from error


def load_recipe(path: Path | None, flags: Mapping[str, Any], settings: Iterable[str]) -> Recipe:
    """Merge a YAML file, then flags, then ``--set`` pairs; the later wins.

    Args:
        path: the file, or None.
        flags: dotted key -> value; a value of None was not given.
        settings: ``a.b=c`` strings, ``c`` read as YAML.
    """
    values = _read_yaml(path) if path is not None else {}
    for key, value in flags.items():
        if value is not None:
            _put(values, key, value)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting!r} is not of the form key=value, for instance training.eta=2")
        _put(values, key.strip(), yaml.safe_load(text))
    for needed in ("model", "data", "out", "task"):
        if needed not in values:
            raise ConfigError(f"{needed} is missing; give --{needed} or put {needed!r} into a recipe")
    task = values["task"]
    values["task"] = TaskConfig(**({"name": task} if isinstance(task, str) else task))
    return validate_model(Recipe, values, "recipe")


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, without what was left at its default."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"no recipe file {str(path)!r}")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping with the keys {', '.join(Recipe.model_fields)}")
    return values


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise ConfigError(f"cannot set {key!r}: {part!r} is not a section")
    values[last] = value


def _as_number(value: Any, key: str) -> Any:
    """YAML reads ``1e-4`` as text; a field that takes a float takes it as the number it is."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        raise ConfigError(f"{key}={value!r} is not a number") from None
