"""A recipe: everything a training run needs, as one YAML file or as flags, with unknown keys refused."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch
import yaml
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.utils import is_liger_kernel_available

from lte.config import MethodConfig, method_config, method_of, sparsity_is, validate_model
from lte.errors import LAST_SEED, ConfigError
from lte.hub import read_config
from lte.tasks import TaskConfig
from lte.training import PAPER, check_optimizer, check_ranges

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "single-stage": {"sparsity": {}, "training": {}},
    "paper": {"sparsity": {"method": "lte", "grouping": "kmeans", "router_init": "random"}, "training": PAPER},
}
"""Name of a preset -> what its runs have in their sections unless they say otherwise."""

DEFAULT_METHOD = "self-prediction"
"""What makes a model sparse where nothing else is asked for: docs/self-prediction.md has the table behind it."""


class Recipe(pydantic.BaseModel):
    """One training run.

    Attributes:
        preset: ``single-stage``, or ``paper`` for the published two stages, grouping and initialisation.
        model: folder or hub id of the dense model.
        data: file, folder or hub name of the training data.
        out: folder the model is written to.
        task: see :class:`lte.tasks.TaskConfig`.
        sparsity: ``method`` (default ``self-prediction``, in the preset ``paper`` ``lte``) and that method's settings,
            see :class:`lte.SelfPredictionConfig` and :class:`lte.LTEConfig`.
        training: fields of :class:`lte.LTETrainingArguments` (of ``transformers.TrainingArguments`` for a dense
            run).
        seed: of grouping, routers, data order and dropout.
        dtype: of the weights, but for the routers', which are float32; ``auto`` takes the checkpoint's. Left out,
            ``float32`` where weights are trained and ``auto`` in ``sparsify``. Trained in ``bfloat16``, the optimizer
            rounds at random (torchao's AdamW), unless ``training.optim`` names one that does not:
            :func:`lte.training.optimizer_for`.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    preset: str = "single-stage"
    model: str
    data: str
    out: str
    task: TaskConfig
    sparsity: dict[str, Any] = {}
    training: dict[str, Any] = {}
    seed: int = pydantic.Field(0, ge=0, le=LAST_SEED)
    dtype: Literal["float32", "bfloat16", "float16", "auto"] | None = None

    def method(self) -> MethodConfig:
        """The sparsity method's config. Of methods with a fixed share, the target sparsity is a setting."""
        preset = PRESETS[self.preset]["sparsity"]
        name = self.sparsity.get("method", preset.get("method", DEFAULT_METHOD))
        values = {"seed": self.seed, **(preset if name == preset.get("method") else {}), **self.sparsity}
        values.pop("method", None)
        target = self.training.get("target_sparsity")
        kind = None if target is None else sparsity_is(name)
        if kind == "its own":
            raise ConfigError(
                f"target_sparsity={target}: under method={name!r} a model has a sparsity of its own; leave it out"
            )
        if kind == "fixed share" and values.setdefault("sparsity", target) != target:
            raise ConfigError(f"target_sparsity={target} and sparsity.sparsity={values['sparsity']}: give one")
        return method_config(name, values)

    def dense_activation(self) -> str | None:
        """The activation a dense run puts into the model, if any; it takes no other sparsity setting."""
        if self.sparsity not in ({}, {"activation": None}, {"activation": "relu"}):
            raise ConfigError(
                f"a dense run takes of the 'sparsity' section at most activation: relu, not {self.sparsity}; "
                "use `lte train`, or leave it out"
            )
        return self.sparsity.get("activation")

    @pydantic.field_validator("preset")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in PRESETS:
            raise ValueError(f"known presets: {', '.join(PRESETS)}")
        return name

    def arguments(self, cls: type[TrainingArguments], **defaults: Any) -> Any:
        """The training arguments, of class ``cls``; ``defaults`` yield to the recipe."""
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
        values = {"seed": self.seed, **defaults}
        name = self.preset
        if "stages" in fields and name == "single-stage":
            name = method_of(self.method()).preset
        preset = PRESETS[name]["training"] if "stages" in fields else {}
        given = {**preset, **self.training}
        if "target_sparsity" in fields and self.method().sparsity_is != "threshold":
            given = {"eta": 0.0, **given, "target_sparsity": None}
        if given.get("stages") == 2 and "num_train_epochs" in given:
            raise ConfigError("training.num_train_epochs needs stages=1; give stage1_epochs and stage2_epochs")
        for key, value in given.items():
            if key not in fields or key == "output_dir":
                near = difflib.get_close_matches(key, [name for name in fields if name != "output_dir"], n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"unknown recipe key 'training.{key}'{hint}")
            values[key] = _typed(value, f"training.{key}", str(fields[key].type))
        try:
            args = cls(**values)
            _check_arguments(args)
            self._check_dtype(args)
        except ConfigError:
            raise
        except (TypeError, ValueError, ImportError) as error:
            raise ConfigError(f"training: {error}") from error
        return args

    def _check_dtype(self, args: TrainingArguments) -> None:
        """ConfigError where the dtype of the weights cannot be trained."""
        dtype = read_config(self.model).dtype if self.dtype == "auto" else getattr(torch, self.dtype or "float32")
        if dtype == torch.float16:
            raise ConfigError(
                f"dtype={self.dtype!r}: float16 weights cannot be trained, small gradients vanish and AdamW divides by "
                "zero; use dtype=bfloat16, or dtype=float32 with training.bf16=true"
            )
        if dtype == torch.bfloat16:
            check_optimizer(args)


def load_recipe(path: Path | None, flags: Mapping[str, Any], settings: Iterable[str]) -> Recipe:
    """Merge a YAML file, then flags, then ``--set`` pairs; the later wins.

    Args:
        path: the file, or None.
        flags: dotted key -> value; a value of None was not given.
        settings: ``a.b=c`` strings, ``c`` read as YAML.
    """
    values = read_yaml(path) if path is not None else {}
    for key, value in flags.items():
        if value is not None:
            put(values, key, value)
    for setting in settings:
        put(values, *parse_setting(setting))
    return parse_recipe(values)


def parse_setting(text: str) -> tuple[str, Any]:
    """``a.b=c`` -> the key and the value, read as YAML."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text!r} is not of the form key=value, for instance training.eta=2")
    return key.strip(), _parse_yaml(value, f"--set {key}")


def parse_recipe(values: dict[str, Any]) -> Recipe:
    """A recipe from a mapping; ConfigError names what is missing, unknown or out of range."""
    if isinstance(values.get("task"), str):
        values["task"] = {"name": values["task"]}
    for needed in ("model", "data", "out", "task"):
        if needed not in values:
            raise ConfigError(f"{needed} is missing; give --{needed} or put {needed!r} into a recipe")
    if not isinstance(values["task"], dict) or "name" not in values["task"]:
        raise ConfigError(f"task={values['task']!r} must name a task: lm, classify, or one of lte tasks")
    values["task"] = TaskConfig(**{str(key): value for key, value in values["task"].items()})
    return validate_model(Recipe, values, "recipe")


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, without what was left at its default."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False)


def read_yaml(path: Path) -> dict[str, Any]:
    """A recipe or study file as it stands; ConfigError where there is none or it is no mapping."""
    if not path.is_file():
        raise ConfigError(f"no recipe file {str(path)!r}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file: {error}") from error
    values = _parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping: keys with values")
    return values


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, to which 2:4 is text, and not 124 as a number of base 60."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)
        is_number = tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        return "tag:yaml.org,2002:str" if is_number and ":" in value else tag


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key of a recipe that is still a mapping."""
    *path, last = key.split(".")
    for part in path:
        if values.get(part) is None:
            values[part] = {}
        elif part == "task" and isinstance(values[part], str):
            values[part] = {"name": values[part]}
        values = values[part]
        if not isinstance(values, dict):
            raise ConfigError(f"cannot set {key!r}: {part!r} is not a section")
    values[last] = value


def _typed(value: Any, key: str, kind: str) -> Any:
    """A value as the field's type has it; ConfigError where it cannot be.

    YAML's types differ from what is meant: ``1e-4`` is text to it, and ``no`` is False.
    """
    if "Strategy" in kind and value is False:
        return "no"
    if key.endswith("_kwargs") and not isinstance(value, dict | None):
        raise ConfigError(f"{key}={value!r} is not a mapping; give {{name: value}}")
    if kind.removesuffix(" | None") == "list[str]" and not isinstance(value, list | None):
        raise ConfigError(f"{key}={value!r} is not a list; give [name, name]")
    words = set(re.findall(r"\w+", kind)) - {"class"}
    optional = bool(words & {"None", "NoneType"})
    words -= {"None", "NoneType"}
    if not words or not words <= {"int", "float", "bool"}:
        return value
    if value is None:
        if not optional:
            raise ConfigError(f"{key} has no value; give one, or leave it out")
        return None
    if words == {"bool"}:
        if not isinstance(value, bool):
            raise ConfigError(f"{key}={value!r} must be true or false")
        return value
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{key}={value!r} is not a number") from None
    if not math.isfinite(number):
        raise ConfigError(f"{key}={value!r} is not a finite number")
    # Steps are shares where they are below 1, and whole numbers above.
    whole = "float" not in words or (key.endswith("_steps") and number == int(number))
    if whole and number != int(number):
        raise ConfigError(f"{key}={value!r} is not a whole number")
    return int(number) if whole else number


_EVALUATE = "run `lte evaluate` on the result"
UNUSED = {
    **dict.fromkeys(("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "metric_for_best_model"), _EVALUATE),
    "resume_from_checkpoint": "give --resume",
}
"""Settings of transformers that a run takes no notice of -> what does what they would."""


def _check_arguments(args: Any) -> None:
    """What transformers would only stumble over once the run has begun."""
    check_ranges(args)
    for name, instead in UNUSED.items():
        if getattr(args, name) not in (None, 0, "no"):
            raise ConfigError(f"training.{name} is not used; {instead}")
    if args.optim_args and not re.fullmatch(r"[^=,]+=[^=,]*(,[^=,]+=[^=,]*)*", args.optim_args):
        raise ConfigError(f"training.optim_args={args.optim_args!r} is not of the form name=value,name=value")
    try:
        with suppress(ValueError):  # of those that need the model
            Trainer.get_optimizer_cls_and_kwargs(args)
    except ImportError as error:
        raise ConfigError(f"training.optim={args.optim.value}: {error}") from None
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ConfigError("training.use_liger_kernel=True needs the package liger-kernel; install it or leave it out")
    if args.torch_compile_mode not in (None, *(modes := torch._inductor.list_mode_options())):
        raise ConfigError(f"training.torch_compile_mode={args.torch_compile_mode} must be one of {', '.join(modes)}")
    schedules = {getattr(args, "stage1_scheduler", None), args.lr_scheduler_type} - {None}
    for name in schedules:
        get_scheduler(
            name,
            torch.optim.SGD([torch.zeros(1)], lr=1.0),
            num_warmup_steps=1,
            num_training_steps=10,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
