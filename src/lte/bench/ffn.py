"""One FFN, dense and sparse, over more distinct layers than any cache holds and masks that change with every call."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte.bench.machine import copy_gbytes_per_s, read_gbytes_per_s
from lte.bench.rows import TOLERANCE, Row
from lte.bench.shapes import move_threshold
from lte.errors import ConfigError
from lte.grouping import check_divisible
from lte.inference import Crossover
from lte.inference.crossover import capture, measure
from lte.inference.packing import streaming_copy
from lte.nn import SparseFFN, ThresholdRouter
from lte.nn.ffn import PathChooser, path_unmeasured
from lte.ops import (
    FFNWeights,
    backend_obstacle,
    cpu_instruction_set,
    requested_backend,
    route,
    routed_ffn,
    sparse_ffn_reference,
)
from lte.thresholds import shifted

DISTINCT_BYTES = 512 << 20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Case:
    """A stack of FFN layers: the sparse ones, and the same weights as the dense baseline wants them."""

    ffns: list[SparseFFN]
    dense_down: list[Tensor]
    device: torch.device
    choose_path: PathChooser = path_unmeasured
    weights: list[FFNWeights] = field(init=False)
    routers: list[ThresholdRouter] = field(init=False)

    def __post_init__(self) -> None:
        self.weights = [ffn.packed_weights() for ffn in self.ffns]
        self.routers = [ffn.router for ffn in self.ffns if isinstance(ffn.router, ThresholdRouter)]

    def dense(self, layer: int, x_TD: Tensor) -> Tensor:
        """torch's dense FFN: three matrix products on weights in the stock layout."""
        weights = self.weights[layer]
        assert weights.gate is not None
        return F.linear(F.silu(F.linear(x_TD, weights.gate)) * F.linear(x_TD, weights.up), self.dense_down[layer])

    def sparse(self, layer: int, x_TD: Tensor) -> Tensor:
        """The operator, router included, on the path a prepared model takes."""
        router = self.routers[layer]
        impl, max_density = self.choose_path(x_TD.shape[0])
        return routed_ffn(
            x_TD, router.weight, router.bias, router.threshold, self.weights[layer], impl=impl, max_density=max_density
        )

    @property
    def layer_bytes(self) -> int:
        """Bytes of one dense layer."""
        return 3 * self.dense_down[0].numel() * self.dense_down[0].element_size()


@torch.no_grad()
def bench_ffn(
    *,
    d_model: int = 4096,
    d_ff: int = 11008,
    dtype: str = "bf16",
    sparsities: Sequence[float] = (0.0, 0.5, 0.75, 0.9),
    tokens: Sequence[int] = (1,),
    expert_size: int = 32,
    impl: str = "auto",
    device: torch.device | None = None,
    rounds: int = 25,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[list[Row], Crossover | None]:
    """Rows of dense against sparse time, router included, for a SwiGLU FFN, and the table ``auto`` chose by.

    Dense, sparse and a plain read of the same bytes take turns, so that a ratio compares neighbours in time; times are
    medians over the rounds.

    Args:
        d_model, d_ff, dtype: the FFN; ``dtype`` is one of ``fp32``, ``bf16``, ``fp16``.
        sparsities: targets; the share of (token, expert) pairs left out, which is also what a row reports.
        tokens: numbers of tokens per call; each token is routed on its own.
        expert_size: neurons per expert.
        impl: ``auto`` measures first and takes the dense path where that wins, as a prepared model does.
        device: CPU by default.
        rounds: timed rounds per row.
        progress: told what is being measured.
    """
    device = device or torch.device("cpu")
    _check(d_ff, expert_size, dtype, sparsities, tokens)
    backend = _backend(impl, DTYPES[dtype], device)
    case = _build(d_model, d_ff, DTYPES[dtype], expert_size, device)
    crossover = None
    if impl == "auto" and backend != "reference":
        progress("measuring where dense wins")
        crossover = measure(case.ffns[0], backend)
    choose: PathChooser = crossover.choose if crossover else (lambda tokens: (backend, 1.0))
    case.choose_path = choose
    rows = []
    for n_tokens in tokens:
        for sparsity in sparsities:
            progress(f"{n_tokens} tokens, sparsity {sparsity:g}")
            path = choose(n_tokens)[0]
            rows.append(_measure(case, n_tokens, sparsity, backend if path == "fastest" else path, rounds))
    return rows, crossover


def _check(d_ff: int, expert_size: int, dtype: str, sparsities: Sequence[float], tokens: Sequence[int]) -> None:
    check_divisible(d_ff, expert_size)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    for sparsity in sparsities:
        if not 0 <= sparsity < 1:
            raise ConfigError(f"sparsity={sparsity} is out of range; it is the share left out, from 0 up to below 1")
    for number in tokens:
        if number < 1:
            raise ConfigError(f"tokens={number} is out of range; it is at least 1")


def _backend(impl: str, dtype: torch.dtype, device: torch.device) -> str:
    wanted = requested_backend(impl)
    if wanted != "auto":
        return wanted
    fast = "triton" if device.type == "cuda" else "cpu"
    return "reference" if backend_obstacle(fast, dtype, device) else fast


def _build(d_model: int, d_ff: int, dtype: torch.dtype, expert_size: int, device: torch.device) -> Case:
    generator = torch.Generator(device=device).manual_seed(0)
    pattern = torch.randn(1 << 20, generator=generator, device=device).to(dtype)

    def matrix(rows: int, columns: int) -> Tensor:
        shift = int(torch.randint(len(pattern), (1,), generator=generator, device=device))
        tiled = pattern.roll(shift).repeat(-(-rows * columns // len(pattern)))[: rows * columns]
        return streaming_copy(tiled.view(rows, columns) * columns**-0.5)

    layer_bytes = 3 * d_model * d_ff * pattern.element_size()
    n_layers = max(2, -(-DISTINCT_BYTES // layer_bytes))
    ffns, downs = [], []
    for layer in range(n_layers):
        parts = {name: nn.Linear(1, 1, bias=False) for name in ("gate_proj", "up_proj", "down_proj")}
        for name, part in parts.items():
            shape = (d_model, d_ff) if name == "down_proj" else (d_ff, d_model)
            part.weight = nn.Parameter(matrix(*shape), requires_grad=False)
        router = ThresholdRouter(d_model, d_ff // expert_size, device=device)
        torch.nn.init.zeros_(router.bias)  # type: ignore[arg-type]
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator, device=device) * d_model**-0.5)
        downs.append(parts["down_proj"].weight.data)
        ffn = SparseFFN(
            {**parts, "act_fn": nn.SiLU()},
            {"gate": "gate_proj", "up": "up_proj", "down": "down_proj", "act": "act_fn"},
            activation="silu",
            router=router,
            layer_index=layer,
        )
        ffn.pack(streaming_copy)
        ffns.append(ffn.eval())
    return Case(ffns, downs, device)


def _measure(case: Case, n_tokens: int, sparsity: float, backend: str, rounds: int) -> Row:
    first = case.ffns[0].weights()
    generator = torch.Generator().manual_seed(1)
    inputs = [
        torch.randn(n_tokens, first.d_model, generator=generator).to(case.device, first.up.dtype)
        for _ in range(rounds + 2)
    ]
    _set_sparsity(case, inputs, sparsity)
    error = max(_error(case, layer, inputs[layer % len(inputs)]) for layer in range(min(2, len(case.ffns))))
    tolerance = TOLERANCE[first.up.dtype]
    used = [_used(case.ffns[i % len(case.ffns)], x) for i, x in enumerate(inputs)]
    row: Row = {
        "d_model": first.d_model,
        "d_ff": first.d_ff,
        "dtype": {v: k for k, v in DTYPES.items()}[first.up.dtype],
        "tokens": n_tokens,
        "expert_size": first.d_ff // case.ffns[0].router.n_experts,
        "sparsity": 1 - sum(pairs for pairs, _ in used) / len(used),
        "backend": backend if backend != "reference" else "reference (dense)",
        "instruction_set": cpu_instruction_set() if case.device.type == "cpu" else "",
        "threads": torch.get_num_threads(),
        "baseline": "torch dense FFN, eager" if case.device.type == "cpu" else "cuBLAS dense FFN, CUDA graph",
        "max_error": error,
        "tolerance": tolerance,
        "status": "ok" if error <= tolerance else f"failed: error {error:.2g} above {tolerance:.2g}",
    }
    if error > tolerance:
        return row
    union = sum(experts for _, experts in used) / len(used)
    router = case.routers[0].weight
    moved = case.layer_bytes * (union if backend != "reference" else 1.0) + router.numel() * router.element_size()
    dense, sparse, limit = (_time_gpu if case.device.type == "cuda" else _time_cpu)(case, inputs, rounds)
    return row | {
        "dense_ms": dense * 1e3,
        "sparse_ms": sparse * 1e3,
        "speedup": dense / sparse,
        "bytes_moved": int(moved),
        "gbytes_per_s": moved / sparse / 1e9,
        "limit_gbytes_per_s": limit,
        "share_of_limit": moved / sparse / 1e9 / limit,
        "dense_gbytes_per_s": case.layer_bytes / dense / 1e9,
    }


def _set_sparsity(case: Case, inputs: list[Tensor], sparsity: float) -> None:
    for router in case.routers:
        if sparsity <= 0:
            router.threshold = shifted(0.5, -math.inf)
        else:
            move_threshold(router, inputs, sparsity)


def _mask(ffn: SparseFFN, x_TD: Tensor) -> Tensor:
    router = ffn.router
    assert isinstance(router, ThresholdRouter)
    return route(x_TD, router.weight, router.bias) > router.threshold


def _used(ffn: SparseFFN, x_TD: Tensor) -> tuple[float, float]:
    """Share of (token, expert) pairs that run, and share of experts some token uses."""
    mask = _mask(ffn, x_TD)
    return float(mask.float().mean()), float(mask.any(0).float().mean())


def _error(case: Case, layer: int, x_TD: Tensor) -> float:
    ffn = case.ffns[layer]
    wanted = sparse_ffn_reference(x_TD.float(), case.weights[layer].float(), _mask(ffn, x_TD))
    return float((case.sparse(layer, x_TD).float() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9))


def _time_cpu(case: Case, inputs: list[Tensor], rounds: int) -> tuple[float, float, float]:
    dense, sparse, limits = [], [], []
    n = len(case.ffns)
    for i in range(rounds + 2):
        x_TD, weights = inputs[i], case.weights[(i + 2) % n]
        assert weights.gate is not None
        started = time.perf_counter()
        case.dense(i % n, x_TD)
        middle = time.perf_counter()
        case.sparse((i + 1) % n, x_TD)
        ended = time.perf_counter()
        limits.append(read_gbytes_per_s([weights.gate, weights.up]))
        if i >= 2:
            dense.append(middle - started)
            sparse.append(ended - middle)
    return median(dense), median(sparse), median(limits[2:])


def _time_gpu(case: Case, inputs: list[Tensor], rounds: int) -> tuple[float, float, float]:
    """Per-layer seconds of one CUDA graph over all layers, for dense and sparse; masks change between replays."""
    x_TD = inputs[0].clone()

    def dense() -> None:
        for layer in range(len(case.ffns)):
            case.dense(layer, x_TD)

    def sparse() -> None:
        for layer in range(len(case.ffns)):
            case.sparse(layer, x_TD)

    times = {}
    for name, body in (("dense", dense), ("sparse", sparse)):
        graph = capture(body)
        samples = []
        for i in range(rounds + 2):
            x_TD.copy_(inputs[i])
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            samples.append(begin.elapsed_time(end) / 1e3 / len(case.ffns))
        times[name] = median(samples[2:])
    return times["dense"], times["sparse"], copy_gbytes_per_s(case.device)
