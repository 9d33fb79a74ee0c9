"""Files that are whole, or not there, and folders that one run writes to."""

from __future__ import annotations

import errno
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from lte.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder go unnoticed there
    fcntl = None  # type: ignore[assignment]


def write_whole(file: Path, text: str) -> None:
    """Write a file so that an interruption leaves the old one, or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def nothing_left(folder: Path, *, new: bool | None = None) -> Iterator[None]:
    """Where what is made in a folder comes to no end, it is gone again, if ``new``; None for one that holds nothing."""
    new = (not folder.is_dir() or not any(folder.iterdir())) if new is None else new
    try:
        yield
    except BaseException:
        if new:
            unlock_folder(folder)
            shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def made_beside(out: Path) -> Iterator[Path]:
    """A new folder of a name nobody has; where all goes well it becomes ``out``, which must be empty or not there.

    Raises:
        ConfigError: another run filled ``out`` meanwhile.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f"{out.name}.", suffix=".partial", dir=out.parent))
    with nothing_left(made, new=True):
        yield made
        made.chmod(0o777 & ~_umask())
        if out.is_dir() and any(out.iterdir()):
            raise ConfigError(f"out={str(out)!r} was filled by another run meanwhile; give another")
        if out.is_dir():
            out.rmdir()
        made.rename(out)


def _umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error says, itself or by what it came from, that there is no space left to write to."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        # Of safetensors and of torch.save, which keep no error of the system.
        if any(said in str(error) for said in ("No space left on device", "os error 27", "PytorchStreamWriter failed")):
            return True
        if "inline_container" in str(error) and "unexpected pos" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}

LOCK = "run.lock"
"""In a folder that a run writes to: who does. The operating system lets go of it when the process ends, however."""

_held: dict[Path, IO[str]] = {}


def lock_folder(folder: Path) -> str | None:
    """Keep a folder for this process until it ends, or :func:`unlock_folder`; who has it already, if somebody does."""
    return lock(folder / LOCK)


def unlock_folder(folder: Path) -> None:
    """Let go of a folder, and leave no trace in it."""
    unlock(folder / LOCK)


def lock(file: Path) -> str | None:
    """Make a file that stands for something one process does at a time; who does it already, if somebody does.

    Once it is had, look whether there is anything left to do: somebody may have done it and let go.
    """
    file = file.parent.resolve() / file.name
    if fcntl is None:
        return None
    if file in _held:
        if _is_open_as(_held[file], file):
            return None
        _held.pop(file).close()  # somebody removed it
    while True:
        handle = file.open("a+")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            owner = handle.read().strip()
            handle.close()
            return owner or "another process"
        except OSError:  # a file system without locks
            handle.close()
            return None
        if _is_open_as(handle, file):
            break
        handle.close()  # it was let go of, and removed, between two lines
    handle.truncate(0)
    with suppress(OSError):  # a full disk: who it is stays unsaid
        os.write(handle.fileno(), f"process {os.getpid()} on {platform.node()}".encode())
    _held[file] = handle
    return None


def unlock(file: Path) -> None:
    """Let go of it, and leave no trace."""
    file = file.parent.resolve() / file.name
    handle = _held.pop(file, None)
    if handle is not None:
        if _is_open_as(handle, file):
            file.unlink()
        handle.close()


def _is_open_as(handle: IO[str], file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), file.stat())
    except FileNotFoundError:
        return False
