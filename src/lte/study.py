"""Studies: a grid of training runs, each evaluated, one JSON per point; what is there already is not run again.

Several processes may run one study at a time: each takes points that no other is at.
"""

from __future__ import annotations

import copy
import fnmatch
import itertools
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import torch
from transformers import AutoModelForCausalLM

from lte.activations import sample_batches
from lte.config import validate_model
from lte.errors import ConfigError
from lte.evaluate import evaluate, load_for_evaluation
from lte.files import lock, unlock, write_whole
from lte.hub import default_device, device_name, load, load_dense, load_tokenizer
from lte.recipe import Recipe, parse_recipe, put, read_yaml
from lte.run_folder import RUN_FILE
from lte.runs import check_recipe, finetune, make_sparse, train
from lte.tasks import Task, TaskConfig, build_task
from lte.tasks.sources import load_rows
from lte.thresholds import DIAL_TOKENS, find_thresholds, set_thresholds, thresholds_of

DENSE = ("finetune", "dense")
"""Commands whose models are dense."""

SCORE_BINS = 20
"""Of the histograms of scores in a point's JSON."""


class Series(pydantic.BaseModel):
    """Points that differ in what the grid says only.

    Attributes:
        command: ``train``, ``sparsify`` (no training), ``finetune`` (a dense baseline) or ``dense`` (the model itself).
        set: recipe keys, dotted -> value. ``{seed}`` in ``model`` stands for the point's seed.
        grid: recipe keys -> values; every combination is a point.
        dial: sparsities that every trained model is evaluated at as well, by moving its thresholds on the training
            data.
        keep: whether the models are kept, for other series to start from.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    command: Literal["train", "sparsify", "finetune", "dense"] = "train"
    keep: bool = False
    set: dict[str, Any] = {}
    grid: dict[str, list[Any]] = {}
    dial: list[Annotated[float, pydantic.Field(gt=0, lt=1)]] = []


class Study(pydantic.BaseModel):
    """A grid of runs.

    Attributes:
        results: folder the points' JSON files go to.
        work: folder of the runs themselves; a model is deleted once it is evaluated.
        base: recipe every point starts from, without ``out``.
        evaluate: ``data``, ``batch_size``, ``decode_tokens`` (so many are generated to be timed, beside the dense
            model), ``tasks`` (of lm-evaluation-harness, see :class:`HarnessTask`) and ``include_path`` (a folder of
            task files); anything else is a task setting (``limit``, ``max_new_tokens``, ...).
        series: name -> its points.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    results: str
    work: str
    base: dict[str, Any]
    evaluate: dict[str, Any]
    series: dict[str, Series]


class HarnessTask(pydantic.BaseModel):
    """A task of lm-evaluation-harness that every model is measured on as well.

    Attributes:
        name: of a task or group.
        limit: rows of every task in it, from the first.
        num_fewshot: examples in a prompt; the task's own number if None.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    name: str
    limit: Annotated[int | None, pydantic.Field(ge=1)] = None
    num_fewshot: Annotated[int | None, pydantic.Field(ge=0)] = None


OF_EVALUATION = ("data", "batch_size", "decode_tokens", "tasks", "include_path")
"""What is no setting of the task in a study's ``evaluate``."""


@dataclass(frozen=True)
class Point:
    """One run.

    Attributes:
        series: name of its series.
        settings: what the grid gave it.
        command: as its series'.
        recipe: the whole run.
        dial: further sparsities to evaluate at.
        file: its JSON.
        keep: whether the model is kept.
    """

    series: str
    settings: dict[str, Any]
    command: str
    recipe: Recipe
    dial: tuple[float, ...]
    file: Path
    keep: bool = False

    @property
    def name(self) -> str:
        """Series and settings."""
        return self.file.stem


def load_study(path: Path) -> Study:
    """Read a study from a file; see :func:`parse_study`."""
    return parse_study(read_yaml(path), str(path))


def parse_study(values: dict[str, Any], name: str) -> Study:
    """A study from a mapping, every point's settings looked at; ConfigError, with its name, where one is wrong."""
    study = validate_model(Study, values, name)
    if "data" not in study.evaluate:
        raise ConfigError(f"{name}: evaluate.data is missing; name the evaluation data")
    for key, least, most in (("batch_size", 1, 2**16), ("decode_tokens", 0, 2**14)):
        number = study.evaluate.get(key, least)
        if type(number) is not int or not least <= number <= most:
            raise ConfigError(f"{name}: evaluate.{key}={number!r} must be a whole number from {least} to {most}")
    if wanted := _harness_tasks(study):
        _task_set([task.name for task in wanted], study)
    names = set()
    for point in points(study):
        if point.name in names:
            raise ConfigError(f"{name}: two points are called {point.name!r}; rename a series")
        names.add(point.name)
        if point.dial and point.command in DENSE:
            raise ConfigError(f"{name}: series {point.series!r} is dense and has no dial")
        if point.command != "dense":
            check_recipe(point.recipe, point.command)
        _scored_task(point, study)
    return study


def check_data(study: Study) -> None:
    """LTEError where what models are to see cannot be read as the task wants it: before any is trained."""
    every = [point for point in points(study) if not _is_done(point)]
    if not every:
        return
    for data, split in {(point.recipe.data, point.recipe.task.split) for point in every}:
        load_rows(data, split, limit=1)
    tokenizer = load_tokenizer(study.base.get("model", every[0].recipe.model))
    build_task(_scored_task(every[0], study)).prepare(study.evaluate["data"], tokenizer)


def points(study: Study) -> Iterator[Point]:
    """All points, in an order in which a study broken off early has something of every series."""
    grids = {name: _combinations(series.grid) for name, series in study.series.items()}
    for rank in range(max(map(len, grids.values()), default=0)):
        for name, series in study.series.items():
            if rank < len(grids[name]):
                yield _point(study, name, series, grids[name][rank])


def run_point(point: Point, study: Study) -> dict[str, Any]:
    """Train, evaluate, write the JSON, delete the model; what an interrupted study left of the run is emptied first."""
    started, path = time.perf_counter(), point.recipe.out
    if point.command == "dense":
        path = point.recipe.model
        summary = {"recipe": point.recipe.model_dump(mode="json", exclude_defaults=True), "steps": 0}
    else:
        run: dict[str, Callable[..., dict[str, Any]]] = {"train": train, "sparsify": make_sparse, "finetune": finetune}
        summary = run[point.command](point.recipe, overwrite=Path(path).is_dir())
    summary.setdefault("seconds", time.perf_counter() - started)
    data, batch_size = study.evaluate["data"], study.evaluate.get("batch_size", 16)
    task = build_task(_scored_task(point, study))
    dense = point.command in DENSE
    model, tokenizer = load_for_evaluation(path, task, dense=dense)
    about = {key: summary[key] for key in ("recipe", "steps", "seconds")} | {
        "threads": torch.get_num_threads(),
        "device": device_name(default_device()),
    }
    asked = {
        "method": "dense" if dense else point.recipe.method().method,
        "target_sparsity": None if dense else point.recipe.training.get("target_sparsity"),
        "steps": summary["steps"],
    }

    def score(file: Path, more: dict[str, Any]) -> dict[str, Any]:
        result = evaluate(
            model, tokenizer, task, data, dense=dense, batch_size=batch_size, seed=point.recipe.seed, bins=SCORE_BINS
        )
        result.pop("samples")
        settings = {**point.settings, **more}
        record = {"series": point.series, **asked, "settings": settings, **result, **more_of, "training": about}
        write_whole(file, json.dumps(record, indent=2) + "\n")
        return record

    more_of: dict[str, Any] = {}
    # The file that says the point is done comes last.
    trained = thresholds_of(model)
    rows = task.prepare(point.recipe.data, tokenizer) if point.dial else None
    seen = sample_batches(rows, task.collator(tokenizer), DIAL_TOKENS) if point.dial else []
    for sparsity in point.dial:
        find_thresholds(model, seen, sparsity)
        score(point.file.with_name(f"{point.name}-dial={sparsity}.json"), {"dial": sparsity})
    if trained:
        set_thresholds(model, trained)
    if decoded := study.evaluate.get("decode_tokens"):
        more_of = _decoding(point, path, task, data, decoded, dense=dense)
    for each in _harness_tasks(study):
        more_of.setdefault("tasks", {})[each.name] = _on_harness(each, path, study, batch_size, dense=dense)
    record = score(point.file, {})
    if not point.keep and point.command != "dense":
        shutil.rmtree(path)
    return record


def _decoding(point: Point, path: str, task: Task, data: str, tokens: int, *, dense: bool) -> dict[str, Any]:
    """``decode``: what :func:`lte.bench.decode.time_beside` says of a causal model; nothing of others."""
    if task.auto_class is not AutoModelForCausalLM:
        return {}
    from lte.bench.decode import time_beside

    tokenizer = load_tokenizer(path)
    row = task.prepare(data, tokenizer)[0]["input_ids"]
    device = default_device()
    stock = load_dense(path if dense else point.recipe.model, task.auto_class, dtype=torch.bfloat16).to(device)
    model = None if dense else load(path, dtype=torch.bfloat16).to(device)
    return {"decode": time_beside(model, stock, torch.tensor([row], device=device), tokens)}


def _harness_tasks(study: Study) -> list[HarnessTask]:
    return [validate_model(HarnessTask, values, "evaluate.tasks") for values in study.evaluate.get("tasks", [])]


def _task_set(names: list[str], study: Study) -> Any:
    from lte.lm_eval import TaskSet

    return TaskSet(names, study.evaluate.get("include_path"))


def _on_harness(task: HarnessTask, path: str, study: Study, batch_size: int, *, dense: bool) -> dict[str, Any]:
    """What a task says of a model: its main number, the others, and the sparsity on it."""
    from lte.lm_eval import LTEModel, evaluate_tasks

    model = LTEModel(path, dense=dense, batch_size=batch_size)
    result = evaluate_tasks(
        model, _task_set([task.name], study), num_fewshot=task.num_fewshot, limit=task.limit, errors=False
    )
    return {key: result[key] for key in ("metric", "value", "sparsity", "extras")} | task.model_dump(exclude={"name"})


def _scored_task(point: Point, study: Study) -> TaskConfig:
    trained = point.recipe.task.model_dump(exclude_defaults=True, exclude={"limit", "split"})
    scored = {key: value for key, value in study.evaluate.items() if key not in OF_EVALUATION}
    return TaskConfig(**{**trained, **scored})


def chosen_points(study: Study, *, only: str = "*", part: str = "1/1") -> list[Point]:
    """Some of a study's points.

    Args:
        study: of :func:`load_study`.
        only: shell pattern of point names.
        part: ``i/n``: every n-th point from the i-th, so that n processes can share a study.
    """
    index, slash, count = part.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise ConfigError(f"part={part!r} must be of the form i/n, for instance 1/2")
    chosen = [point for point in points(study) if fnmatch.fnmatch(point.name, only)]
    if not chosen:
        names = ", ".join(point.name for point in points(study))
        raise ConfigError(f"no point of the study is called {only!r}; there are {names}")
    return chosen[int(index) - 1 :: int(count)]


def _is_done(point: Point) -> bool:
    return point.file.is_file() and (not point.keep or (Path(point.recipe.out) / RUN_FILE).is_file())


def run_study(study: Study, *, only: str, part: str, report: Callable[[str], None]) -> int:
    """Run what is missing; the number of points that were run."""
    every = chosen_points(study, only=only, part=part)
    todo, started, done = [point for point in every if not _is_done(point)], time.monotonic(), 0
    for number, point in enumerate(todo, 1):
        report(f"{len(every) - len(todo) + number}/{len(every)} {point.name}")
        record = _run_alone(point, study, report)
        if record is None:
            continue
        done += 1
        left = (time.monotonic() - started) / number * (len(todo) - number) / 60
        report(
            f"   sparsity {record['sparsity']:.1%}, {record['metric']} {record['value']:.4f}, "
            f"{record['training']['seconds']:.0f} s" + (f"; about {left:.0f} min left" if number < len(todo) else "")
        )
    return done


def _run_alone(point: Point, study: Study, report: Callable[[str], None]) -> dict[str, Any] | None:
    """Run a point that no other process runs; None where one does, or has done it.

    A model that other points start from is waited for.
    """
    file = point.file.with_suffix(".lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    said = False
    while owner := lock(file):
        if not said:
            report(f"   {owner} is at it" + ("; waiting for the model" if point.keep else ""))
            said = True
        if not point.keep:
            return None
        time.sleep(1)
    try:
        return None if _is_done(point) else run_point(point, study)
    finally:
        unlock(file)


def _combinations(grid: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _point(study: Study, name: str, series: Series, settings: dict[str, Any]) -> Point:
    words = [name, *(f"{key.rpartition('.')[2]}={value}" for key, value in settings.items())]
    label = re.sub(r"[^\w.=-]+", "-", "-".join(words))
    values = copy.deepcopy(study.base)
    for key, value in {**series.set, **settings, "out": str(Path(study.work) / label)}.items():
        put(values, key, value)
    if series.command in DENSE:
        values.pop("sparsity", None)  # of the base: a dense baseline has none
    values["model"] = str(values.get("model", "")).replace("{seed}", str(values.get("seed", 0)))
    file = Path(study.results) / f"{label}.json"
    return Point(name, settings, series.command, parse_recipe(values), tuple(series.dial), file, series.keep)
