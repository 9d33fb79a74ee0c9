"""One FFN, dense and sparse, over more distinct layers than any cache holds and masks that change with every call."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte.bench.checks import CODES_TOLERANCE
from lte.bench.machine import copy_gbytes_per_s, read_gbytes_per_s
from lte.bench.rows import TOLERANCE, Row
from lte.bench.shapes import check_sparsities, draw_codes, move_threshold
from lte.errors import ConfigError
from lte.grouping import check_divisible
from lte.inference import Crossover
from lte.inference.crossover import capture, measure
from lte.inference.packing import streaming_copy
from lte.nn import CopyRouter, QuantizedLinear, Router, RouterCost, Routing, SparseFFN, ThresholdRouter
from lte.nn.ffn import PathChooser
from lte.ops import (
    SMALL_BATCH,
    FFNWeights,
    QuantizedFFN,
    backend_obstacle,
    cpu_instruction_set,
    requested_backend,
    sparse_ffn_reference,
)
from lte.ops.lowbit import BITS, COLUMNS
from lte.ops.quantized import quantized_ffn_reference
from lte.thresholds import shifted

DISTINCT_BYTES = 512 << 20
MOST_DENSE = 4
MOST_LAYERS = 512
"""However small they are."""

ROUTERS = ("linear", "copy", "mask")
"""What decides in a benchmark: a linear router, the FFN's own copy, or a mask that is given and costs nothing."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Case:
    """A stack of FFN layers: the sparse ones, and dense ones as the baseline wants them, on the same numbers but where
    the sparse ones have few bits."""

    ffns: list[SparseFFN]
    dense_parts: list[tuple[Tensor, Tensor, Tensor]]
    device: torch.device
    weights: list[FFNWeights | QuantizedFFN] = field(init=False)

    def __post_init__(self) -> None:
        self.weights = [ffn.quantized() or ffn.packed_weights() for ffn in self.ffns]

    def dense(self, layer: int, x_TD: Tensor) -> Tensor:
        """torch's dense FFN: three matrix products on weights in the stock layout."""
        gate, up, down = self.dense_parts[layer % len(self.dense_parts)]
        return F.linear(F.silu(F.linear(x_TD, gate)) * F.linear(x_TD, up), down)

    def sparse(self, layer: int, x_TD: Tensor) -> Tensor:
        """The layer, its router included, on the path a prepared model takes."""
        out: Tensor = self.ffns[layer](x_TD)
        return out

    @property
    def dense_bytes(self) -> int:
        """Of one dense layer."""
        return sum(part.nbytes for part in self.dense_parts[0])

    @property
    def sparse_bytes(self) -> float:
        """Of one sparse layer, where every expert runs."""
        weights = self.weights[0]
        if isinstance(weights, FFNWeights):
            return self.dense_bytes
        return sum(part.numel() for part in self.dense_parts[0]) * weights.up.bits_per_weight / 8


class GivenMask(Router):
    """Costs nothing, and decides at random: what the operator does with a mask, whoever made it.

    Args:
        n_experts: number of experts.
    """

    uses_threshold = False

    def __init__(self, n_experts: int) -> None:
        super().__init__(n_experts)
        self.sparsity = 0.0
        self._known: dict[int, Tensor] = {}

    def forget(self, sparsity: float) -> None:
        """Draw masks of another sparsity from now on."""
        self.sparsity = sparsity
        self._known.clear()

    def forward(self, x: Tensor) -> Routing:
        """A mask for inputs of shape [..., D]; the same for the same memory."""
        if x.data_ptr() not in self._known:
            generator = torch.Generator().manual_seed(len(self._known))
            drawn = torch.rand(*x.shape[:-1], self.n_experts, generator=generator) >= self.sparsity
            self._known[x.data_ptr()] = drawn.to(x.device)
        mask = self._known[x.data_ptr()]
        return Routing(mask, mask)

    def cost(self) -> RouterCost:
        """See :meth:`Router.cost`."""
        return RouterCost(0, 0, 0)


@torch.no_grad()
def bench_ffn(
    *,
    d_model: int = 4096,
    d_ff: int = 11008,
    dtype: str = "bf16",
    sparsities: Sequence[float] = (0.0, 0.5, 0.75, 0.9),
    tokens: Sequence[int] = (1,),
    expert_size: int = 32,
    router: str = "linear",
    bits: int = 3,
    weights: int | None = None,
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
        router: what decides, one of :data:`ROUTERS`.
        bits: of the copy.
        weights: bits of a weight of the sparse FFNs, in groups of 32; None for those of ``dtype``. The dense baseline
            keeps its dtype.
        impl: ``auto`` measures first and takes the dense path where that wins, as a prepared model does.
        device: CPU by default.
        rounds: timed rounds per row.
        progress: told what is being measured.
    """
    device = device or torch.device("cpu")
    if router not in ROUTERS:
        raise ConfigError(f"router {router!r} is unknown; choose one of {', '.join(ROUTERS)}")
    _check(d_model, d_ff, expert_size, dtype, sparsities, tokens)
    if weights is not None:
        _check_few_bits(weights, expert_size, tokens)
    backend = _backend(impl, DTYPES[dtype], device)
    make = partial(_make_router, router, d_model, d_ff // expert_size, bits, device)
    case = _build(d_model, d_ff, DTYPES[dtype], make, device, weights)
    crossover = None
    if impl == "auto" and backend != "reference" and weights is None:
        progress("measuring where dense wins")
        crossover = measure(case.ffns[0], backend)
    choose: PathChooser = crossover.choose if crossover else (lambda tokens: (backend, 1.0))
    for ffn in case.ffns:
        ffn.choose_path = choose
    rows = []
    for n_tokens in tokens:
        for sparsity in sparsities:
            progress(f"{n_tokens} tokens, sparsity {sparsity:g}")
            path = choose(n_tokens)[0]
            rows.append(_measure(case, n_tokens, sparsity, backend if path == "fastest" else path, rounds))
    return rows, crossover


def _check(
    d_model: int, d_ff: int, expert_size: int, dtype: str, sparsities: Sequence[float], tokens: Sequence[int]
) -> None:
    if d_model < 1 or d_ff < 1:
        raise ConfigError(f"d_model={d_model}, d_ff={d_ff}: both are at least 1")
    check_divisible(d_ff, expert_size)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    check_sparsities(sparsities)
    for number in tokens:
        if number < 1:
            raise ConfigError(f"tokens={number} is out of range; it is at least 1")


def _check_few_bits(bits: int, expert_size: int, tokens: Sequence[int]) -> None:
    """Raise ConfigError for a width, experts or numbers of tokens that kernels for few bits do not take."""
    if bits not in BITS:
        raise ConfigError(f"weights of {bits} bits are unknown; choose from {BITS[0]} to {BITS[-1]}")
    if expert_size % COLUMNS:
        raise ConfigError(f"expert_size={expert_size}: experts of few bits have a multiple of {COLUMNS} neurons")
    if max(tokens) > SMALL_BATCH:
        raise ConfigError(f"tokens={max(tokens)}: weights of few bits are written out for more than {SMALL_BATCH}")


def _backend(impl: str, dtype: torch.dtype, device: torch.device) -> str:
    wanted = requested_backend(impl)
    if wanted != "auto":
        return wanted
    fast = "triton" if device.type == "cuda" else "cpu"
    return "reference" if backend_obstacle(fast, dtype, device) else fast


def _make_router(kind: str, d_model: int, n_experts: int, bits: int, device: torch.device) -> Router:
    if kind == "mask":
        return GivenMask(n_experts)
    if kind == "copy":
        return CopyRouter(d_model, n_experts, bits=bits, group=64, device=device)
    router = ThresholdRouter(d_model, n_experts, device=device)
    router.reset_parameters(torch.Generator().manual_seed(0), init_std=1.0, init_score=0.5)
    return router


def _build(
    d_model: int,
    d_ff: int,
    dtype: torch.dtype,
    make_router: Callable[[], Router],
    device: torch.device,
    bits: int | None = None,
) -> Case:
    generator = torch.Generator(device=device).manual_seed(0)
    pattern = torch.randn(1 << 20, generator=generator, device=device).to(dtype)

    def matrix(rows: int, columns: int) -> Tensor:
        shift = int(torch.randint(len(pattern), (1,), generator=generator, device=device))
        tiled = pattern.roll(shift).repeat(-(-rows * columns // len(pattern)))[: rows * columns]
        return streaming_copy(tiled.view(rows, columns) * columns**-0.5)

    layer_bytes = 3 * d_model * d_ff * (pattern.element_size() if bits is None else bits / 8)
    ffns, denses = [], []
    for layer in range(min(MOST_LAYERS, max(2, math.ceil(DISTINCT_BYTES / layer_bytes)))):
        # Beside weights of few bits, the dense baseline takes turns on as many layers as no cache holds.
        if bits is None or layer < MOST_DENSE:
            denses.append((matrix(d_ff, d_model), matrix(d_ff, d_model), matrix(d_model, d_ff)))
        parts: dict[str, nn.Module] = {}
        for name, weight in zip(("gate_proj", "up_proj", "down_proj"), denses[layer % len(denses)], strict=True):
            if bits is None:
                parts[name] = linear = nn.Linear(1, 1, bias=False)
                linear.weight = nn.Parameter(weight, requires_grad=False)
            else:
                storage: dict[str, Any] = {
                    "bits": bits,
                    "group": COLUMNS,
                    "by_columns": name == "down_proj",
                    "device": device,
                }
                parts[name] = few_bits = QuantizedLinear(*weight.T.shape, **storage)
                draw_codes(few_bits, generator)
        ffn = SparseFFN(
            {**parts, "act_fn": nn.SiLU()},
            {"gate": "gate_proj", "up": "up_proj", "down": "down_proj", "act": "act_fn"},
            activation="silu",
            router=make_router(),
            layer_index=layer,
        )
        if bits is None:
            ffn.pack(streaming_copy)
        ffns.append(ffn.eval())
    return Case(ffns, denses, device)


def _measure(case: Case, n_tokens: int, sparsity: float, backend: str, rounds: int) -> Row:
    first = case.weights[0]
    dtype = case.dense_parts[0][0].dtype
    generator = torch.Generator().manual_seed(1)
    inputs = [
        torch.randn(n_tokens, first.d_model, generator=generator).to(case.device, dtype) for _ in range(rounds + 2)
    ]
    for ffn in case.ffns:
        _leave_out(ffn.router, inputs, sparsity)
    error = max(_error(case, layer, inputs[layer % len(inputs)]) for layer in range(min(2, len(case.ffns))))
    plain = isinstance(first, FFNWeights)
    tolerance = TOLERANCE[dtype] if plain else max(TOLERANCE[dtype], CODES_TOLERANCE[0])
    used = [_used(case.ffns[i % len(case.ffns)], x) for i, x in enumerate(inputs)]
    row: Row = {
        "d_model": first.d_model,
        "d_ff": first.d_ff,
        "dtype": {v: k for k, v in DTYPES.items()}[dtype],
        "weights": {v: k for k, v in DTYPES.items()}[dtype] if isinstance(first, FFNWeights) else f"int{first.bits}",
        "tokens": n_tokens,
        "expert_size": first.d_ff // case.ffns[0].router.n_experts,
        "router": _kind_of(case.ffns[0].router),
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
    of_router = case.ffns[0].router.cost().bytes if sparsity > 0 else 0
    moved = case.sparse_bytes * (union if backend != "reference" else 1.0) + of_router
    dense, sparse, limit = (_time_gpu if case.device.type == "cuda" else _time_cpu)(case, inputs, rounds)
    return row | {
        "dense_ms": dense * 1e3,
        "sparse_ms": sparse * 1e3,
        "speedup": dense / sparse,
        "bytes_moved": int(moved),
        "router_bytes": of_router,
        "gbytes_per_s": moved / sparse / 1e9,
        "limit_gbytes_per_s": limit,
        "share_of_limit": moved / sparse / 1e9 / limit,
        "dense_gbytes_per_s": case.dense_bytes / dense / 1e9,
    }


def _kind_of(router: Router) -> str:
    if isinstance(router, CopyRouter):
        return f"copy of {router.bits} bits"
    return "mask given" if isinstance(router, GivenMask) else "linear"


def _leave_out(router: Router, inputs: list[Tensor], sparsity: float) -> None:
    if isinstance(router, GivenMask):
        router.forget(sparsity)
    elif sparsity <= 0:
        router.threshold = shifted(0.5, -math.inf)
    else:
        move_threshold(router, inputs, sparsity)


def _used(ffn: SparseFFN, x_TD: Tensor) -> tuple[float, float]:
    """Share of (token, expert) pairs that run, and share of experts some token uses."""
    mask = ffn.router(x_TD).mask
    return float(mask.float().mean()), float(mask.any(0).float().mean())


def _error(case: Case, layer: int, x_TD: Tensor) -> float:
    ffn = case.ffns[layer]
    weights, mask = case.weights[layer], ffn.router(x_TD).mask
    if isinstance(weights, FFNWeights):
        wanted = sparse_ffn_reference(x_TD.float(), weights.float(), mask)
    else:
        wanted = quantized_ffn_reference(x_TD.float(), weights, mask)
    return float((case.sparse(layer, x_TD).float() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9))


def _time_cpu(case: Case, inputs: list[Tensor], rounds: int) -> tuple[float, float, float]:
    dense, sparse, limits = [], [], []
    n = len(case.ffns)
    for i in range(rounds + 2):
        x_TD, (gate, up, _) = inputs[i], case.dense_parts[(i + 2) % len(case.dense_parts)]
        started = time.perf_counter()
        case.dense(i % n, x_TD)
        middle = time.perf_counter()
        case.sparse((i + 1) % n, x_TD)
        ended = time.perf_counter()
        limits.append(read_gbytes_per_s([gate, up]))
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
