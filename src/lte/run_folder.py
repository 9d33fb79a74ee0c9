"""The folder a run writes to: who may, what is kept of what it replaces, and the record a complete one leaves."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

from accelerate import PartialState

from lte.errors import CheckpointError, ConfigError, LTEError
from lte.files import LOCK, is_full_disk, lock_folder, nothing_left, unlock_folder, write_whole
from lte.memory import is_shortage
from lte.recipe import Recipe, dump_recipe, load_recipe

logger = logging.getLogger(__name__)

RUN_FILE = "lte_run.json"
"""Written beside the weights when a run is complete: recipe, versions, time, last known sparsity."""

MARK = "recipe.yaml"
"""In the folder of every run, from its beginning."""


def read_run(out: Path) -> dict[str, Any]:
    """The record of a complete run; empty where there is none.

    Raises:
        CheckpointError: it cannot be read.
    """
    file = out / RUN_FILE
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; remove it, or take a copy") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{file} is not the record of a run; remove it, or take a copy")
    return record


def lets_go(run: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """However a run ends, others may write to its folder then."""

    @wraps(run)
    def wrapped(recipe: Recipe, **options: Any) -> dict[str, Any]:
        try:
            return run(recipe, **options)
        finally:
            unlock_folder(Path(recipe.out))

    return wrapped


def finished(out: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """The summary of a complete run in ``out``, if one is to be resumed."""
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite contradict each other; give one")
    file = out / RUN_FILE
    if not resume or not file.is_file():
        return None
    _check_same_recipe(load_recipe(out / MARK, {}, []), recipe, out / MARK)
    logger.warning("%s holds a complete run already; nothing to resume", out)
    return read_run(out)


def _check_same_recipe(old: Recipe, new: Recipe, file: Path) -> None:
    before, after = old.model_dump(), new.model_dump()
    changed = [key for key in before if before[key] != after[key] and key != "out"]
    if changed:
        raise ConfigError(
            f"cannot resume with other settings: {', '.join(changed)} differ from {file}; "
            "resume with that file as the recipe, or start again with --overwrite"
        )


def check_folder(out: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """ConfigError if a run into ``out`` would lose or mix results."""
    written = out / MARK
    for key in ("model", "data"):
        source = Path(getattr(recipe, key))
        touched = (out.resolve(), replaced(out))
        if source.exists() and any(source.resolve().is_relative_to(folder) for folder in touched):
            raise ConfigError(
                f"out={str(out)!r} holds {key}={str(source)!r}, which the run reads; choose another --out"
            )
    if out.is_file():
        raise ConfigError(f"out={str(out)!r} is a file; give a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if (out / LOCK).is_file() and PartialState().is_main_process:
        keep_folder(out)
    if overwrite and not written.is_file():
        raise ConfigError(f"out folder {str(out)!r} was not made by lte and is not overwritten; empty it yourself")
    if not overwrite and not resume:
        raise ConfigError(f"out folder {str(out)!r} is not empty; use --resume, --overwrite or another --out")
    if resume and not written.is_file():
        raise ConfigError(f"out folder {str(out)!r} holds no run of lte to resume; choose another --out")
    if resume:
        _check_same_recipe(load_recipe(written, {}, []), recipe, written)


def claim_folder(out: Path, recipe: Recipe, *, overwrite: bool) -> None:
    """Make ``out``, after :func:`check_folder`, and leave the recipe in it; of several processes the first does it.

    What was in a folder that is overwritten stays beside it until the new run is complete, see :func:`replaced`.

    Raises:
        ConfigError: another run writes to it.
    """
    processes = PartialState()
    processes.wait_for_everyone()  # nobody looks at the folder any more
    if processes.is_main_process:
        if overwrite and out.is_dir():
            keep_folder(out)
            set_aside(out)
        new = not out.is_dir()
        out.mkdir(parents=True, exist_ok=True)
        keep_folder(out)
        if (out / RUN_FILE).is_file():
            raise ConfigError(f"out folder {str(out)!r} was filled by another run meanwhile; use another --out")
        with nothing_left_of(out) if new else nullcontext():
            write_whole(out / MARK, dump_recipe(recipe))
    processes.wait_for_everyone()


@contextmanager
def nothing_left_of(out: Path) -> Iterator[None]:
    """Where what is made in a folder that was not there comes to no end, the folder is as it was before."""
    try:
        with nothing_left(out, new=True):
            yield
    except BaseException:
        if replaced(out).is_dir():
            replaced(out).rename(out)
        raise


@contextmanager
def building(out: Path, *, new: bool) -> Iterator[None]:
    """Where what is to train is made: settings that transformers refuses only now are as good as refused before.

    Args:
        out: a folder that was claimed.
        new: whether it was empty, or its contents set aside.

    Raises:
        ConfigError: with what was wrong; the folder is as it was.
    """
    try:
        with nothing_left_of(out) if new and PartialState().is_main_process else nullcontext():
            yield
    except (LTEError, OSError):
        raise
    except Exception as error:
        if is_full_disk(error) or is_shortage(error):
            raise
        raise ConfigError(f"training: {type(error).__name__}: {error}") from error


def replaced(out: Path) -> Path:
    """Where what a run overwrites is until that is complete."""
    out = out.resolve()
    return out.with_name(f"{out.name}.replaced")


def forget_replaced(out: Path, *, mark: str = MARK) -> None:
    """The new run is complete: what it replaces goes."""
    if (replaced(out) / mark).is_file():
        shutil.rmtree(replaced(out), ignore_errors=True)


def keep_folder(out: Path) -> None:
    """Make it this process's until it ends; ConfigError where another run writes to it."""
    if owner := lock_folder(out):
        raise ConfigError(
            f"out folder {str(out)!r} is being written to by {owner}; wait for that run, stop it, or use another --out"
        )


def set_aside(out: Path, *, mark: str = MARK, record: str = RUN_FILE) -> None:
    """Keep what is in a folder, see :func:`replaced`.

    Args:
        out: a folder that is this process's.
        mark: a file of every folder of the kind; what has none is not ours to replace.
        record: a file of those that are complete.
    """
    kept = replaced(out)
    unlock_folder(out)
    if kept.exists() and not (kept / mark).is_file():
        raise ConfigError(f"{str(kept)!r} is in the way of what --overwrite keeps there, and is none of lte's; move it")
    if kept.is_dir() and (kept / record).is_file() and not (out / record).is_file():
        shutil.rmtree(out)  # a run that was to replace it, and never came to its end
    else:
        shutil.rmtree(kept, ignore_errors=True)
        out.rename(kept)
        logger.info("what was in %s is in %s until the new run is complete", out, kept)
