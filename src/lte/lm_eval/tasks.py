"""Finding the harness' tasks, running them, and what comes out beside sparsity and FLOPs."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import yaml
from lm_eval.api.group import Group
from lm_eval.tasks import TaskManager

from lm_eval import simple_evaluate
from lte.errors import ConfigError, DataError, LTEError
from lte.lm_eval.model import LTEModel, quiet_harness
from lte.tasks.sources import quiet
from lte.versions import versions

HARNESS_KEYS = ("results", "versions", "n-shot", "n-samples", "higher_is_better")
"""What of the harness' own result is kept; its per-sample record and configs are not."""


class TaskSet:
    """Tasks, groups and tags of the harness by name, or task files by path.

    Args:
        names: as ``--tasks`` has them.
        include_path: folder of task files, which win over the harness' own of the same name.

    Raises:
        ConfigError: a name is unknown, or the folder holds no task.
    """

    def __init__(self, names: Sequence[str], include_path: str | Path | None = None) -> None:
        self.names = list(dict.fromkeys(name.strip() for name in names if name.strip()))
        if not self.names:
            raise ConfigError("--tasks names no task; give for instance --tasks lambada_openai,piqa")
        self.include_path = include_path
        files = _task_files(include_path)
        with quiet_harness(), quiet():
            self.manager = TaskManager(include_path=include_path, include_defaults=False)
            local = all(self._known(name) for name in self.names)
            # Indexing the harness' own thousands of tasks takes seconds.
            if not (local and self._complete()):
                self.manager = TaskManager(include_path=include_path)
        for name in self.names:
            if not self._known(name):
                raise _unknown_task(name, self.manager.all_tasks, include_path, len(files))

    def load(self) -> list[Any]:
        """The task objects, new ones every time, with their data; DataError where that cannot be had."""
        loaded: list[Any] = []
        for name in self.names:
            try:
                with quiet_harness(), quiet():
                    found = self.manager.load([name])
            except Exception as error:
                raise DataError(f"task {name!r} cannot be loaded: {_reason(error)}; {_way_out(error)}") from error
            group = found.get("groups", {}).get(name)
            loaded += [group] if group is not None else list(found["tasks"].values())
        seen: set[str] = set()
        for task in leaves(loaded):
            if task.task_name in seen:
                raise ConfigError(f"--tasks asks for {task.task_name!r} twice, on its own or in a group; leave one out")
            seen.add(task.task_name)
        return loaded

    def _known(self, name: str) -> bool:
        return name in self.manager.all_tasks or (name.endswith((".yaml", ".yml")) and Path(name).is_file())

    def _complete(self) -> bool:
        """Whether the groups asked for have all their members in the folder."""
        waiting, seen = list(self.names), set()
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            entry = self.manager.task_index.get(name)
            if entry is None:
                return name.endswith((".yaml", ".yml"))
            members = (entry.cfg or {}).get("task")
            if isinstance(members, list):
                if not all(isinstance(member, str) for member in members):
                    return False
                waiting += members
        return True


def evaluate_tasks(
    model: LTEModel,
    tasks: TaskSet,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    loaded: list[Any] | None = None,
    errors: bool = True,
) -> dict[str, Any]:
    """Run tasks on a model, and account for what it used.

    Args:
        model: of :class:`LTEModel`.
        tasks: what to run.
        num_fewshot: examples in the prompt; each task's own number by default.
        limit: rows of every task, from the first.
        seed: of the choice of examples, and of torch; 0 leaves the harness' own seeds.
        loaded: what ``tasks.load()`` gave, where that was called before.
        errors: whether the harness finds standard errors, for which it draws samples, minutes for a perplexity.

    Returns:
        What :func:`lte.evaluate.evaluate` returns: ``metric`` and ``value`` are the accuracy (else the first metric) of
        the one task, or the mean over several where it is the same metric, ``extras`` the others; and ``harness``: the
        names of the ``tasks`` and groups, the harness' own ``results`` (values and standard errors by task),
        ``versions`` of the tasks, ``n-shot``, ``n-samples``, ``higher_is_better``, ``num_fewshot`` and ``limit``.

    Raises:
        DataError: the rows of a task are not what its file says.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit} must be at least 1")
    loaded = tasks.load() if loaded is None else loaded
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    try:
        with quiet_harness(), quiet():
            found = simple_evaluate(
                model,
                tasks=loaded,
                task_manager=tasks.manager,
                num_fewshot=num_fewshot,
                limit=limit,
                batch_size=model.batch_size,
                log_samples=False,
                **({} if errors else {"bootstrap_iters": 0}),
                **(dict.fromkeys(seeds, seed) if seed else {}),
            )
    except LTEError:
        raise
    except (jinja2.TemplateError, KeyError, ValueError, AssertionError) as error:
        raise DataError(f"task {','.join(tasks.names)} cannot be evaluated: {_reason(error)}") from error
    names = [item.name if isinstance(item, Group) else item.task_name for item in loaded]
    metric, value, extras = summary({name: found["results"][name] for name in names})
    return {
        "metric": metric,
        "value": value,
        **model.accounting(),
        "model": model.pretrained,
        "task": ",".join(tasks.names),
        "data": ", ".join(dict.fromkeys(_source(task) for task in leaves(loaded))),
        "seed": seed,
        "versions": {**versions(), "lm_eval": version("lm_eval")},
        "extras": extras,
        "samples": [],
        "harness": {
            "tasks": names,
            **{key: found[key] for key in HARNESS_KEYS if key in found},
            "num_fewshot": num_fewshot,
            "limit": limit,
        },
    }


def summary(results: dict[str, dict[str, Any]]) -> tuple[str, float, dict[str, float]]:
    """Main metric, its value, and all others, of the harness' results by task."""
    metrics = {name: _metrics(result) for name, result in results.items()}
    empty = [name for name, found in metrics.items() if not found]
    if empty:
        raise ConfigError(f"task {empty[0]!r} has no number of its own; name its tasks, see `lm_eval ls tasks`")
    main = {name: "acc" if "acc" in found else next(iter(found)) for name, found in metrics.items()}
    one = len(metrics) == 1
    extras = {
        metric if one else f"{name} {metric}": value
        for name, found in metrics.items()
        for metric, value in found.items()
        if not (one and metric == main[name])
    }
    first = next(iter(metrics))
    if one:
        return main[first], metrics[first][main[first]], extras
    if len(set(main.values())) == 1:
        return f"mean {main[first]}", sum(metrics[name][main[name]] for name in metrics) / len(metrics), extras
    return f"{first} {main[first]}", metrics[first][main[first]], extras


def leaves(items: Sequence[Any]) -> list[Any]:
    """The tasks of some tasks and groups."""
    return [task for item in items for task in (item.get_all_tasks() if isinstance(item, Group) else [item])]


def _metrics(result: dict[str, Any]) -> dict[str, float]:
    """``acc,none`` -> ``acc``; standard errors and texts left out."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in result.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }


def _source(task: Any) -> str:
    """What a task reads: the hub's name of its data set, or its files."""
    config = task.config
    files = (config.dataset_kwargs or {}).get("data_files", config.dataset_kwargs if config.custom_dataset else None)
    if isinstance(files, dict):
        return ", ".join(str(file) for file in files.values())
    return str(files or config.dataset_path)


def _task_files(folder: str | Path | None) -> list[Path]:
    if folder is None:
        return []
    if not Path(folder).is_dir():
        raise ConfigError(f"--include-path {str(folder)!r} is no folder; give one that holds task files (.yaml)")
    files = sorted(Path(folder).glob("**/*.yaml"))
    if not files:
        raise ConfigError(f"--include-path {str(folder)!r} holds no task file (.yaml)")
    for file in files:
        try:
            yaml.compose(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    return files


def _unknown_task(name: str, known: Sequence[str], folder: str | Path | None, n_files: int) -> ConfigError:
    if name.endswith((".yaml", ".yml")):
        return ConfigError(f"--tasks: no task file {name!r}")
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "`lm_eval ls tasks` lists the harness' own"
    own = "no --include-path was given" if folder is None else f"{n_files} task files in --include-path {folder}"
    return ConfigError(f"--tasks: unknown task {name!r}; {hint} (searched: the harness' own tasks; {own})")


def _way_out(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError) and ".json" in str(error):
        return "paths in a task file are relative to the working directory"
    return "its data comes from the hub unless its file says otherwise: check the network, or use --include-path"


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
