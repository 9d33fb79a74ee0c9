"""What the commands share: the console, the JSON file, and the command line as it was typed."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from lte.errors import ConfigError
from lte.files import write_whole

if TYPE_CHECKING:
    from lte.training import Terminated

console = Console(soft_wrap=True)

LONGEST_NAME = 220
"""Bytes of a file's name; file systems take 255, and a file that is being written has a longer one."""


def command_line() -> str:
    """The command as it was typed, for the record in a result."""
    return shlex.join(["lte", *sys.argv[1:]])


def check_json_target(path: Path | None) -> Path | None:
    """Refuse, before a long run, what a result cannot be written to, and any file that is none of an earlier result."""
    if path is None:
        return None
    if path.is_dir():
        raise ConfigError(f"--json {str(path)!r} is a folder; name a file")
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise ConfigError(f"--json {path.name[:20]!r}... has a name too long for a file")
    if path.exists() and not _is_result(path):
        raise ConfigError(
            f"--json {str(path)!r} is there, and is no result of lte: it is not overwritten; name another"
        )
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ConfigError(f"--json {str(path)!r} cannot be written: {str(above)!r} is no folder one can write to")
    return path


JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Write the result to this file.", callback=check_json_target)
]


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Write a result and the command that made it, where a file was asked for; whole, or not at all."""
    if path is not None:
        write_whole(path, json.dumps({"command": command_line()} | result, indent=2) + "\n")


@contextmanager
def stoppable(how: Callable[[Terminated | None], str]) -> Iterator[None]:
    """Say how to go on after Ctrl-C, of which ``how`` is given None, or SIGTERM."""
    from lte.training import Terminated, termination

    try:
        with termination():
            yield
    except KeyboardInterrupt:
        typer.echo(f"interrupted; {how(None)}", err=True)
        raise typer.Exit(130) from None
    except Terminated as stopped:
        typer.echo(f"stopped by SIGTERM; {how(stopped)}", err=True)
        raise typer.Exit(143) from None


def _is_result(path: Path) -> bool:
    try:
        found = json.loads(path.read_text()) if path.is_file() else None
    except (ValueError, OSError, RecursionError):
        return False
    return isinstance(found, dict) and str(found.get("command", "")).split(" ")[0] == "lte"


def numbers(text: str, name: str) -> list[float]:
    """``0,0.5`` -> [0.0, 0.5], the value of the flag ``--name``."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--{name} {text!r} is no list of numbers; write it like 0,0.5,0.8") from None


def whole_numbers(text: str, name: str) -> list[int]:
    """``1,16`` -> [1, 16], the value of the flag ``--name``."""
    found = numbers(text, name)
    if not all(math.isfinite(number) and number == int(number) for number in found):
        raise ConfigError(f"--{name} {text!r} is no list of whole numbers; write it like 1,16")
    return [int(number) for number in found]


class ProgressBar:
    """A rich progress bar with the time left, as the callback evaluation takes."""

    def __init__(self, description: str) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn(description),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self.task = self.bar.add_task(description, total=None)

    def __enter__(self) -> ProgressBar:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Show so many of all."""
        self.bar.update(self.task, completed=done, total=total)
