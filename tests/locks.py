"""A process that holds a lock, as another run does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CODE = """
import sys
from pathlib import Path
from lte.files import lock
lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def held_elsewhere(file: Path) -> Iterator[int]:
    """The id of the process that holds it, which is killed at the end."""
    other = subprocess.Popen(
        [sys.executable, "-c", CODE, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        yield other.pid
    finally:
        other.kill()
        other.wait()
