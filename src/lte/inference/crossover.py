"""Where dense wins: measured once on the running machine, so that a sparse model is never slower than a dense one."""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lte.errors import CheckpointError
from lte.nn import SparseFFN
from lte.ops import cpu_instruction_set, linear, sparse_ffn, sparse_ffn_reference

logger = logging.getLogger(__name__)

TOKENS = (1, 4, 16, 32, 64, 256)
FILE_NAME = "lte_crossover.json"


@dataclass(frozen=True)
class Crossover:
    """For each number of tokens, the largest share of active (token, expert) pairs at which the sparse kernel wins.

    Attributes:
        machine: what it was measured on; a table from another machine is not used.
        shape: d_model, d_ff, number of experts and dtype of the FFN measured.
        backend: ``cpu`` or ``triton``.
        max_density: number of tokens -> density in [0, 1]; 1: sparse always wins, 0: dense always wins.
        linear_tokens: up to how many tokens :func:`lte.ops.linear` beats the matrix product of torch; 0: never.
        expected_density: density assumed where the mask cannot be looked at, which is on a GPU.
    """

    machine: str
    shape: str
    backend: str
    max_density: dict[int, float] = field(default_factory=dict)
    linear_tokens: int = 0
    expected_density: float = 0.5

    def choose(self, tokens: int) -> tuple[str, float]:
        """``impl`` and ``max_density`` for a call with so many tokens; a :data:`lte.nn.ffn.PathChooser`."""
        measured = sorted(self.max_density)
        density = self.max_density[next((t for t in measured if t >= tokens), measured[-1])]
        if density <= 0 or (self.backend != "cpu" and density < self.expected_density):
            return "reference", 0.0
        return "fastest", density if self.backend == "cpu" else 1.0

    def describe(self) -> str:
        """One line for the log."""
        parts = []
        for tokens, density in sorted(self.max_density.items()):
            if density >= 1:
                parts.append(f"{tokens}: always sparse")
            elif density <= 0:
                parts.append(f"{tokens}: dense")
            else:
                parts.append(f"{tokens}: sparse above {100 * (1 - density):.0f} % sparsity")
        return f"{self.backend} on {self.machine}, {self.shape}; tokens: {', '.join(parts)}, more: the same"

    def save(self, folder: str | Path) -> None:
        """Write the table beside a saved model."""
        (Path(folder) / FILE_NAME).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: str | Path) -> Crossover:
        """Read a saved table; CheckpointError where there is none, or it is not one."""
        path = Path(folder) / FILE_NAME
        try:
            raw = json.loads(path.read_text())
            raw["max_density"] = {int(tokens): float(density) for tokens, density in raw["max_density"].items()}
            if not raw["max_density"]:
                raise ValueError("it is empty")
            return cls(**raw)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path}: no table of measured speeds ({error}); prepare without it") from error


def machine_name(device: torch.device) -> str:
    """What a measurement is good for: the processor or GPU, and the number of threads."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{platform.machine()} {cpu_instruction_set()}, {torch.get_num_threads()} threads"


def shape_name(ffn: SparseFFN) -> str:
    """``4096x11008/344 bfloat16``."""
    weights = ffn.weights()
    dtype = str(weights.up.dtype).removeprefix("torch.")
    return f"{weights.d_model}x{weights.d_ff}/{ffn.n_experts} {dtype}"


@torch.no_grad()
def measure(ffn: SparseFFN, backend: str, *, expected_density: float = 0.5, budget_seconds: float = 4.0) -> Crossover:
    """Time the sparse kernel and the dense path of one packed FFN over several numbers of tokens.

    Args:
        ffn: a packed FFN of the model; those of its other layers are taken to be alike.
        backend: ``cpu`` or ``triton``.
        expected_density: see :class:`Crossover`.
        budget_seconds: larger numbers of tokens are not measured, and taken to be as the last, once this is spent.
    """
    weights = ffn.weights()
    device, n_experts = weights.up.device, ffn.n_experts
    generator = torch.Generator().manual_seed(0)
    table: dict[int, float] = {}
    started = time.perf_counter()
    for tokens in TOKENS:
        if table and time.perf_counter() - started > budget_seconds:
            break
        x_TD = torch.randn(tokens, weights.d_model, generator=generator).to(device, weights.up.dtype)
        masks = {
            density: (torch.rand(tokens, n_experts, generator=generator) < density).to(device) for density in (1.0, 0.3)
        }
        dense = seconds(partial(sparse_ffn_reference, x_TD, weights), device)
        sparse = {
            density: seconds(partial(sparse_ffn, x_TD, weights, mask, impl=backend), device)
            for density, mask in masks.items()
        }
        table[tokens] = _crossing(dense, sparse)
    linear_tokens = _linear_tokens(weights.up, generator) if backend == "cpu" else 0
    found = Crossover(machine_name(device), shape_name(ffn), backend, table, linear_tokens, expected_density)
    logger.info("measured in %.1f s: %s", time.perf_counter() - started, found.describe())
    return found


def _crossing(dense: float, sparse: dict[float, float]) -> float:
    """The density at which the sparse time, a straight line through its two points, meets the dense time."""
    if sparse[1.0] <= dense:
        return 1.0
    slope = (sparse[1.0] - sparse[0.3]) / 0.7
    if slope <= 0:
        return 0.0
    return round(min(0.99, max(0.0, 1.0 - (sparse[1.0] - dense) / slope)), 3)


def _linear_tokens(weight: Tensor, generator: torch.Generator) -> int:
    best = 0
    for tokens in TOKENS[:5]:
        x_TD = torch.randn(tokens, weight.shape[1], generator=generator).to(weight.dtype)
        if seconds(partial(linear, x_TD, weight), weight.device) > seconds(
            partial(F.linear, x_TD, weight), weight.device
        ):
            break
        best = tokens
    return best


def seconds(call: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Median time of a call, after one that is not counted; on a GPU, of a CUDA graph of it: no launches."""
    if device.type == "cuda":
        return _graph_seconds(call, repeats)
    times = []
    for number in range(repeats + 1):
        started = time.perf_counter()
        call()
        if number:
            times.append(time.perf_counter() - started)
    return median(times)


def _graph_seconds(call: Callable[[], object], repeats: int, replays: int = 10) -> float:
    graph = capture(call)
    times = []
    for _ in range(repeats + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / replays)
    return median(times[1:])


def capture(call: Callable[[], object]) -> Any:
    """A CUDA graph of a call, after warming up beside the default stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph
