"""Time of a prompt through whole models, side by side in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lte.accounting import model_cost
from lte.bench import llama_cpp
from lte.bench.checks import ffn_error, tolerances
from lte.bench.ffn import DTYPES
from lte.bench.rows import Row
from lte.bench.shapes import check_sparsities, dense_twin, leave_out, model_config, random_model, thresholds_again
from lte.config import MethodConfig
from lte.errors import ConfigError
from lte.inference import Crossover, prepare_for_inference
from lte.methods import LTEConfig
from lte.nn import SparsityMeter, observe_routing, sparse_ffns
from lte.ops import SMALL_BATCH
from lte.versions import versions

LONGEST = 2**17
"""Tokens of a prompt."""


@dataclass
class Engine:
    """One way to read a prompt.

    Attributes:
        row: what is known of it before it runs.
        seconds: of one prompt, [1, S].
        prepare: called before every turn.
        times: of every turn.
    """

    row: Row
    seconds: Callable[[Tensor], float]
    prepare: Callable[[], object] = lambda: None
    times: list[float] = field(default_factory=list)


@torch.no_grad()
def bench_prefill(
    *,
    config_name: str = "llama-1.2b",
    dtype: str = "bf16",
    tokens: Sequence[int] = (8, 32, 100, 512, 2048),
    sparsities: Sequence[float] = (0.0, 0.5, 0.8),
    rounds: int = 3,
    method: MethodConfig | None = None,
    with_llama_cpp: bool = True,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[list[Row], Crossover | None]:
    """Milliseconds of prompts through stock transformers, this package at each sparsity, and llama.cpp.

    All hold random weights of one shape, take turns, and compute the logits of a prompt's last token only, beside the
    KV cache of all.

    Args:
        config_name: a shape of :data:`lte.bench.shapes.SHAPES`, or a ``config.json``.
        dtype: ``fp32`` or ``bf16``.
        tokens: of the prompts.
        sparsities: of the FFNs; rows report the one reached on the prompt.
        rounds: turns per engine, after one that does not count.
        method: linear routers on experts of 32 by default.
        with_llama_cpp: whether to measure llama.cpp, where ``llama-cpp-python`` and ``gguf`` are installed.
        progress: told what is being done.

    Returns:
        A row for every prompt and engine, and where the sparse model was found to gain nothing.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    if not tokens or min(tokens) < 2 or rounds < 1:
        raise ConfigError(f"tokens={list(tokens)}, rounds={rounds}: at least 2 and 1")
    if max(tokens) > LONGEST:
        raise ConfigError(f"tokens={list(tokens)}: at most {LONGEST}")
    check_sparsities(sparsities)
    config = model_config(config_name)
    progress("building the model")
    model = random_model(config, DTYPES[dtype], torch.device("cpu"), method or LTEConfig(expert_size=32))
    progress("measuring where dense wins")
    prepare_for_inference(model)
    generator = torch.Generator().manual_seed(0)
    ids_1S = torch.randint(1, config.vocab_size, (1, max(tokens)), generator=generator)
    common = {"dtype": dtype, "threads": torch.get_num_threads(), "status": "ok", "max_error": None}
    stock = dense_twin(model)
    name = f"transformers {versions()['transformers']}, torch {versions()['torch']}"
    engines = [Engine({"engine": "transformers", **common, "sparsity": 0.0, "version": name}, _through(stock))]
    for sparsity in sparsities:
        progress(f"setting the routers to sparsity {sparsity:g}")
        engines.append(_ours(model, sparsity, ids_1S[:, :256], common))
    rows: list[Row] = []
    with ExitStack() as stack:
        if with_llama_cpp:
            progress("writing the model for llama.cpp")
            engines.append(_llama_cpp(stock, dtype, max(tokens), common, stack))
        for count in tokens:
            rows += _take_turns(engines, model, ids_1S[:, :count], rounds, progress)
    return rows, getattr(model, "lte_crossover", None)


def _through(model: Any) -> Callable[[Tensor], float]:
    def seconds(ids_1S: Tensor) -> float:
        started = time.perf_counter()
        model(ids_1S, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - started

    return seconds


def _ours(model: Any, sparsity: float, calibration: Tensor, common: Row) -> Engine:
    leave_out(model, sparsity, calibration)
    row = {"engine": "lte", **common, "asked": sparsity, "version": f"lte {versions()['lte']}"}
    return Engine(row, _through(model), thresholds_again(model))


def _llama_cpp(stock: Any, dtype: str, context: int, common: Row, stack: ExitStack) -> Engine:
    reason = llama_cpp.obstacle(stock.config, dtype, model_cost(stock).dense_bytes)
    row = {"engine": "llama.cpp", **common, "sparsity": 0.0, "version": reason or llama_cpp.description()}
    if reason:
        return Engine(row | {"status": f"left out: {reason}"}, lambda ids: 0.0)
    file = stack.enter_context(llama_cpp.model_file(stock.config, DTYPES[dtype]))
    engine = stack.enter_context(llama_cpp.LlamaCpp(file, stock.config, context))
    return Engine(row, lambda ids: engine.prompt_seconds(ids[0].tolist()))


def _take_turns(
    engines: Sequence[Engine], model: Any, ids_1S: Tensor, rounds: int, progress: Callable[[str], None]
) -> list[Row]:
    count = ids_1S.shape[1]
    rows = []
    for engine in engines:
        row = {**engine.row, "tokens": count}
        engine.times = []
        if row["engine"] == "lte":
            engine.prepare()
            row |= _checked(model, ids_1S)
        rows.append(row)
    for number in range(rounds + 1):
        for engine, row in zip(engines, rows, strict=True):
            if row["status"] == "ok":
                progress(f"{count} tokens, round {number} of {rounds}: {row['engine']}")
                engine.prepare()
                seconds = engine.seconds(ids_1S)
                if number:
                    engine.times.append(seconds)
    medians = [median(engine.times) if engine.times else None for engine in engines]
    rival = next((m for m, row in zip(medians, rows, strict=True) if row["engine"] == "llama.cpp"), None)
    for found, row, engine in zip(medians, rows, engines, strict=True):
        if found is not None:
            assert medians[0] is not None
            row |= {
                "ms": found * 1e3,
                "speedup": medians[0] / found,
                "speedup_over_llama_cpp": None if rival is None else rival / found,
                "ms_rounds": [t * 1e3 for t in engine.times],
            }
    return rows


def _checked(model: Any, ids_1S: Tensor) -> Row:
    """The sparsity on a prompt, which path takes it, and its error."""
    ffns, count = sparse_ffns(model), ids_1S.shape[1]
    meter = SparsityMeter(len(ffns))
    meter.set_token_mask(None)
    with observe_routing(model, meter):
        model(ids_1S, use_cache=False, logits_to_keep=1)
    error, allowed = ffn_error(model, count), tolerances(model)[0]
    impl, densest = ffns[0].choose_path(count)
    row: Row = {"sparsity": meter.overall, "backend": "dense" if 1 - meter.overall > densest else impl}
    if count > SMALL_BATCH and not ffns[0].masks_prompts:
        row = {"sparsity": 0.0, "backend": "all neurons"}
    row |= {"max_error": error, "tolerance": allowed}
    if not error <= allowed:
        row["status"] = f"failed: FFN error {error:.2g} above {allowed:.2g}"
    return row
