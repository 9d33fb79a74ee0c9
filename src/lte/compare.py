"""Methods beside each other on one task: a study is made of a few words, run, and reported on."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModel

from lte.config import METHODS, settings_of
from lte.errors import ConfigError
from lte.files import write_whole
from lte.hub import read_config
from lte.recipe import parse_setting, read_yaml
from lte.report.comparison import write_report
from lte.sparsify import install_sparse_ffns
from lte.study import DENSE, Study, check_data, parse_study, points, run_study
from lte.tasks.sources import load_rows

STUDY_FILE = "study.yaml"
"""In the folder of a comparison: the study it is, for ``lte sweep`` too."""

FIRST = "dense-first"
"""Series of the dense model that all go on from, where the first steps are dense."""

HELD_OUT = 10
"""Where there is no evaluation data, every so-manieth row of the data is held out."""


@dataclass(frozen=True)
class Entry:
    """A method as it takes part.

    Attributes:
        name: what it was called, and its series is.
        method: of :data:`lte.config.METHODS`.
        trained: whether the model is trained under it; if not, it is applied to the dense model that was.
    """

    name: str
    method: str
    trained: bool

    @classmethod
    def parse(cls, text: str, steps: int) -> Entry:
        """``METHOD``, ``METHOD:trained`` or ``METHOD:untrained``, each under a name of its own as ``NAME=...``.

        ConfigError for anything else.
        """
        name, given, called = text.strip().partition("=")
        method, _, how = (called if given else name).partition(":")
        settings_of(method)
        if how not in ("", "trained", "untrained"):
            raise ConfigError(f"{text!r}: after a method's name comes :trained or :untrained, or nothing")
        if name in ("", "dense", FIRST) or "." in name:
            raise ConfigError(f"{text!r}: a name must not be empty, 'dense', {FIRST!r} or have dots")
        if how == "trained" and not METHODS[method][1].trainable:
            raise ConfigError(f"{text!r}: a model cannot be trained under {method!r}")
        if how == "trained" and not steps:
            raise ConfigError(f"{text!r} needs steps to train for; give --steps")
        return cls(name, method, bool(steps) and (how == "trained" or (not how and METHODS[method][1].trains)))


def design(
    base: dict[str, Any],
    *,
    methods: Sequence[str],
    sparsities: Sequence[float],
    steps: int,
    seeds: int,
    eval_data: str,
    out: Path,
    dense_steps: int = 0,
    settings: Sequence[tuple[str, str, Any]] = (),
    decode_tokens: int = 0,
    tasks: Sequence[str] = (),
    include_path: Path | None = None,
) -> dict[str, Any]:
    """The study of a comparison: the dense model first, fine-tuned for as many steps, then every method.

    Args:
        base: recipe of all runs, without ``out``.
        methods: see :meth:`Entry.parse`.
        sparsities: targets, in (0, 1).
        steps: optimiser steps of the dense model and of every method that trains; 0 trains nothing.
        seeds: seeds 0, 1, ... of every point.
        eval_data: what all are evaluated on.
        out: folder of results and models.
        dense_steps: of the steps, the first so many with the dense model, once for it and every method that trains.
        settings: (name, key, value): of the entry, or of all entries of the method, that is called so.
        decode_tokens: generated to be timed at every point, beside the dense model; 0 times nothing.
        tasks: of lm-evaluation-harness, ``NAME``, or ``NAME:limit=200:num_fewshot=5``.
        include_path: folder of more task files.

    Raises:
        ConfigError: an unknown method, one named twice, no method or sparsity, a sparsity outside (0, 1) or given
            twice, or a setting of a method that does not take part.
    """
    entries = [Entry.parse(name, steps) for name in methods]
    if not entries or not sparsities:
        raise ConfigError("give at least one of --methods and one of --sparsities")
    if wrong := next((value for value in sparsities if not 0 < value < 1), None):
        raise ConfigError(f"sparsity {wrong} must lie between 0 and 1")
    if len(set(sparsities)) < len(sparsities):
        raise ConfigError(f"sparsities: one is given twice in {', '.join(map(str, sparsities))}")
    known = {name for entry in entries for name in (entry.name, entry.method)}
    if idle := next((each for each in settings if each[0] not in known), None):
        raise ConfigError(
            f"{idle[0]}.{idle[1]}={idle[2]} is of no method of this comparison; they are {', '.join(sorted(known))}"
        )
    if len({entry.name for entry in entries}) < len(entries):
        raise ConfigError(f"methods: one is named twice in {', '.join(methods)}")
    if steps < 0 or seeds < 1:
        raise ConfigError(f"steps={steps}, seeds={seeds}: steps must not be negative, and there must be a seed")
    if not 0 <= dense_steps < max(steps, 1):
        raise ConfigError(f"dense_steps={dense_steps} must be fewer than steps={steps}: they are the first of them")
    grid = {"seed": list(range(seeds)), "training.target_sparsity": list(sparsities)}
    series: dict[str, Any] = {}

    def finetuned(name: str, settings: dict[str, Any]) -> str:
        series[name] = {"command": "finetune", "set": settings, "grid": {"seed": grid["seed"]}, "keep": True}
        return str(out / "models" / f"{name}-seed={{seed}}")

    long: dict[str, Any] = {"training.max_steps": steps - dense_steps}
    if dense_steps:
        long["model"] = finetuned(FIRST, {"training.max_steps": dense_steps})
    tuned = base["model"]
    if steps:
        tuned = finetuned("dense", long)
    else:
        series["dense"] = {"command": "dense", "grid": {"seed": [0]}}
    for entry in entries:
        own = {
            f"sparsity.{key}": value
            for of in (entry.method, entry.name)  # what has an entry's own name wins
            for name, key, value in settings
            if name == of
        }
        if not entry.trained:
            own = {"model": tuned, **own}
        elif METHODS[entry.method][1].preset == "paper":
            left = steps - dense_steps
            stages = {"training.stage1_steps": left // 2, "training.stage2_steps": left - left // 2}
            own = {**long, **stages, **own}
            del own["training.max_steps"]
        else:
            own = {**long, **own}
        own = {"sparsity.method": entry.method, **own}
        shown = {"seed": grid["seed"]} if METHODS[entry.method][0].sparsity_is == "its own" else grid
        series[entry.name] = {"command": "train" if entry.trained else "sparsify", "set": own, "grid": shown}
    evaluation: dict[str, Any] = {"data": eval_data}
    if decode_tokens:
        evaluation["decode_tokens"] = decode_tokens
    if tasks:
        evaluation["tasks"] = [_harness_task(text) for text in tasks]
    if include_path is not None:
        evaluation["include_path"] = str(include_path)
    return {
        "results": str(out / "points"),
        "work": str(out / "models"),
        "base": base,
        "evaluate": evaluation,
        "series": series,
    }


def _harness_task(text: str) -> dict[str, Any]:
    """``NAME:key=value:...`` as the study has it."""
    name, *settings = text.strip().split(":")
    return {"name": name, **dict(parse_setting(setting) for setting in settings)}


def held_out(out: Path) -> tuple[Path, Path]:
    """Where :func:`hold_out` puts the rows for training, and those for evaluation."""
    return out / "data" / "train.jsonl", out / "data" / "held-out.jsonl"


def hold_out(data: str, split: str | None, out: Path) -> None:
    """Divide rows into two files in ``out``: training, and every tenth row for evaluation; once.

    Raises:
        ConfigError: there are too few rows, or the files are of other data.
    """
    kept, held = held_out(out)
    source, about = held.with_name("source.json"), {"data": data, "split": split}
    before = json.loads(source.read_text()) if source.is_file() else about
    if before != about:
        raise ConfigError(f"{out} holds a comparison on {before['data']}, not {data}; use another --out")
    if held.is_file():
        return
    rows = load_rows(data, split)
    if len(rows) < 2 * HELD_OUT:
        raise ConfigError(
            f"{data} has {len(rows)} rows, too few to hold some out for evaluation; give --eval-data FILE"
        )
    held.parent.mkdir(parents=True, exist_ok=True)
    write_whole(source, json.dumps(about) + "\n")
    tenth = [i for i in range(len(rows)) if i % HELD_OUT == 0]
    rest = [i for i in range(len(rows)) if i % HELD_OUT]
    for file, chosen in ((kept, rest), (held, tenth)):
        partial = file.with_suffix(f".{os.getpid()}.partial")
        rows.select(chosen).to_json(partial)
        os.replace(partial, file)


def compare(
    study: dict[str, Any],
    out: Path,
    *,
    report: Callable[[str], None],
    prepare: Callable[[], None] | None = None,
) -> Path:
    """Run what a comparison still lacks, and write its report.

    Args:
        study: of :func:`design`. Methods, sparsities and seeds may have come to those of an earlier call.
        out: folder.
        report: told what is being done.
        prepare: called before the first point, once all settings are known to be good.

    Returns:
        ``report.html``; ``points.csv``, ``table.md`` and the figures are beside it.

    Raises:
        ConfigError: the folder holds another comparison, or a method cannot serve the model.
    """
    loaded = parse_study(study, "the comparison")
    _check_fits(loaded)
    file = out / STUDY_FILE
    if file.is_file():
        _check_same(read_yaml(file), study, out)
    elif out.is_dir() and any(path.name != "data" and path.suffix != ".partial" for path in out.iterdir()):
        raise ConfigError(f"{out} is not empty, and holds no comparison; use another --out")
    if prepare is not None:
        prepare()
    check_data(loaded)
    write_whole(file, yaml.safe_dump(study, sort_keys=False))
    try:
        run_study(loaded, only="*", part="1/1", report=report)
    finally:
        page = write_report(out)
    return page


def _check_fits(study: Study) -> None:
    """ConfigError where a method cannot serve the model: found without its weights, before anything is run."""
    config, done = read_config(study.base["model"]), set()
    for point in points(study):
        if point.command in DENSE or point.series in done:
            continue
        done.add(point.series)
        with torch.device("meta"):
            model = AutoModel.from_config(copy.deepcopy(config))
        try:
            install_sparse_ffns(model, point.recipe.method())
        except ConfigError as error:
            raise ConfigError(f"{point.series}: {error}") from error


def _check_same(before: dict[str, Any], study: dict[str, Any], out: Path) -> None:
    """ConfigError where what is in a folder was run with other settings; points may have come to it."""
    for key in ("base", "evaluate"):
        old = before.get(key, {})
        if old != study[key]:
            changed = [name for name in study[key] if old.get(name) != study[key][name]]
            raise ConfigError(f"{out} holds a comparison with another {', '.join(changed) or key}; use another --out")
    for name, series in study["series"].items():
        earlier = before.get("series", {}).get(name)
        if earlier is not None and {**earlier, "grid": None} != {**series, "grid": None}:
            raise ConfigError(f"{out} holds {name!r} with other settings or steps; use another --out")
