"""Tile sizes of the kernels: a default per GPU class, and what ``autotune`` measured on this machine."""

from __future__ import annotations

import functools
import json
import os
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

Capability = tuple[int, int]


@dataclass(frozen=True)
class GPU:
    """What the choice of tiles depends on."""

    name: str
    capability: Capability
    sms: int


@dataclass(frozen=True)
class Config:
    """Tiles of the hidden and the down kernel for one token bucket; see ``kernels.py``.

    Attributes:
        hidden_rows, down_rows: neurons per program, and per step of the down kernel's loop.
        hidden_cols, down_cols: columns of D per step of the hidden kernel's loop, and per program.
        hidden_warps, down_warps, hidden_stages, down_stages: warps and software-pipeline depth.
        down_programs_per_sm: sets into how many parts the active neurons are split.
        pdl: programmatic dependent launch, sm_90 and later: the next kernel's start overlaps this one's end.
    """

    hidden_rows: int
    hidden_cols: int
    hidden_warps: int
    hidden_stages: int
    down_rows: int
    down_cols: int
    down_warps: int
    down_stages: int
    down_programs_per_sm: int
    pdl: bool = False


@dataclass(frozen=True)
class Problem:
    """The shape that a configuration was chosen for."""

    d_model: int
    d_ff: int
    expert_size: int
    dtype: torch.dtype
    gated: bool
    n_tokens: int

    @property
    def bucket(self) -> int:
        """1, or the tile of 16, 32 or 64 tokens that the kernels work on."""
        return token_bucket(self.n_tokens)

    def key(self, gpu: GPU) -> str:
        """Name in the cache file."""
        kind = "gated" if self.gated else "plain"
        shape = f"D{self.d_model}-F{self.d_ff}-n{self.expert_size}-{kind}"
        return f"{gpu.name}|{shape}|{str(self.dtype).removeprefix('torch.')}|T{self.bucket}"


def token_bucket(n_tokens: int) -> int:
    """1, 16, 32 or 64."""
    if n_tokens == 1:
        return 1
    return 16 if n_tokens <= 16 else 32 if n_tokens <= 32 else 64


# All stream through asynchronous copies into shared memory, also for one token: left to itself, ptxas issues the loads
# of a register tile one at a time, each after the arithmetic on the last. Half of the down kernel's stages are indices.
_ONE = Config(4, 1024, 4, 3, down_rows=16, down_cols=256, down_warps=4, down_stages=5, down_programs_per_sm=2)
_TILES = {
    16: Config(32, 128, 4, 4, down_rows=32, down_cols=128, down_warps=4, down_stages=7, down_programs_per_sm=2),
    32: Config(32, 128, 4, 3, down_rows=32, down_cols=64, down_warps=4, down_stages=7, down_programs_per_sm=2),
    64: Config(32, 64, 4, 4, down_rows=32, down_cols=64, down_warps=4, down_stages=7, down_programs_per_sm=2),
}
# 100 KiB of shared memory per SM: smaller programs, so that several fit.
_CONSUMER_ONE = replace(_ONE, hidden_cols=512, hidden_stages=4)
_DEFAULTS: dict[Capability, dict[int, Config]] = {
    (8, 0): {1: _ONE, **_TILES},
    (8, 6): {1: _CONSUMER_ONE, **_TILES},
    (8, 9): {1: _CONSUMER_ONE, **_TILES},
    (9, 0): {1: _ONE, **_TILES},
}


def default_config(gpu: GPU, problem: Problem) -> Config:
    """The built-in tiles: those of the newest listed GPU that is not newer than this one."""
    listed = [capability for capability in _DEFAULTS if capability <= gpu.capability] or [min(_DEFAULTS)]
    config = _DEFAULTS[max(listed)][problem.bucket]
    if problem.dtype == torch.float32:
        # Twice the bytes per element; and no tensor cores, whose operands need not sit in registers.
        narrow = 2 if problem.bucket == 1 else 4
        config = replace(config, hidden_cols=config.hidden_cols // narrow, down_cols=config.down_cols // 2)
        if problem.bucket > 1:
            config = replace(config, hidden_stages=2, down_stages=2, down_rows=16)
    return config


def candidates(gpu: GPU, problem: Problem) -> list[Config]:
    """What ``autotune`` tries: variations of the default, one part at a time."""
    base = default_config(gpu, problem)
    changes: list[dict[str, Any]]
    if problem.bucket == 1:
        changes = [{"hidden_rows": rows, "hidden_stages": stages} for rows in (2, 4, 8) for stages in (1, 3, 4)]
        changes += [{"hidden_cols": cols} for cols in (512, 1024, 2048)]
        changes += [{"down_cols": cols, "down_rows": rows} for cols in (128, 256, 512) for rows in (8, 16, 32)]
    else:
        changes = [{"hidden_rows": rows, "hidden_stages": stages} for rows in (16, 32, 64) for stages in (2, 3, 4)]
        changes += [{"down_cols": cols, "down_rows": rows} for cols in (32, 64, 128) for rows in (32, 64)]
    changes += [{"down_stages": stages} for stages in (3, 5, 7)]
    changes += [{"down_programs_per_sm": count} for count in (1, 2, 3, 4, 6)]
    if gpu.capability >= (9, 0):
        changes += [{"pdl": True}]
    return [base, *(replace(base, **change) for change in changes)]


def cache_file() -> Path:
    """Where tuned tiles are kept; ``LTE_CACHE_DIR`` overrides the folder."""
    return Path(os.environ.get("LTE_CACHE_DIR") or Path.home() / ".cache" / "lte") / "triton.json"


def config_for(gpu: GPU, problem: Problem) -> Config:
    """The tuned tiles of this GPU and shape, or the default."""
    return _tuned(cache_file()).get(problem.key(gpu)) or default_config(gpu, problem)


def remember(gpu: GPU, problem: Problem, config: Config) -> None:
    """Add a tuned configuration to the cache file."""
    path = cache_file()
    configs = {**_tuned(path), problem.key(gpu): config}
    path.parent.mkdir(parents=True, exist_ok=True)
    # Renamed into place, so that a process that reads meanwhile sees one state or the other.
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps({key: asdict(value) for key, value in configs.items()}, indent=1, sort_keys=True))
    os.replace(scratch, path)
    _tuned.cache_clear()


@functools.cache
def _tuned(path: Path) -> dict[str, Config]:
    """The cache file's content; nothing where it is missing or from another version."""
    if not path.exists():
        return {}
    try:
        return {key: Config(**value) for key, value in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"{path} is not a table of tuned kernels and is ignored ({error}); delete it.", stacklevel=2)
        return {}
