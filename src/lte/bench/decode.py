"""Decoding speed of whole models through the ordinary ``generate``, side by side in one run."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.configuration_utils import CompileConfig
from transformers.generation.streamers import BaseStreamer

from lte.accounting import model_cost
from lte.bench import llama_cpp
from lte.bench.checks import check_logits, ffn_error, tolerances
from lte.bench.ffn import DTYPES
from lte.bench.limit import DecodeBytes, decode_bytes
from lte.bench.machine import copy_gbytes_per_s, read_gbytes_per_s
from lte.bench.rows import Row
from lte.bench.shapes import (
    check_sparsities,
    dense_config,
    dense_twin,
    leave_out,
    model_config,
    random_model,
    thresholds_again,
)
from lte.config import MethodConfig, WeightsConfig
from lte.errors import ConfigError
from lte.hub import load
from lte.inference import Crossover, prepare_for_inference
from lte.inference.decode import DecodeStep
from lte.memory import peak_memory
from lte.methods import DenseConfig, LTEConfig
from lte.nn import sparse_ffns
from lte.ops import FFNWeights
from lte.planes import picks_neurons, planes_of, set_bits_per_token, weights_config
from lte.sparsify import sparsify
from lte.versions import versions

PROMPT_TOKENS = 16
MOST_TOKENS = 4096  # of a turn


@dataclass
class Engine:
    """One way to decode.

    Attributes:
        row: what is known of it before it runs.
        seconds: runs it once, for a number of new tokens; seconds per token.
        prepare: called before every turn.
        n_bytes: bytes a step reads.
        times: seconds per token, one entry per round.
    """

    row: Row
    seconds: Callable[[int], float]
    n_bytes: float
    prepare: Callable[[], object] = lambda: None
    times: list[float] = field(default_factory=list)


@torch.no_grad()
def bench_decode(
    *,
    config_name: str | None = "llama-1.2b",
    model_folder: str | None = None,
    dtype: str = "bf16",
    sparsities: Sequence[float] = (0.0, 0.5, 0.8),
    batch: int = 1,
    new_tokens: int = 32,
    rounds: int = 3,
    method: MethodConfig | None = None,
    weights: Sequence[int] = (),
    plain: bool = True,
    bits_per_token: Sequence[float] = (),
    compiled: bool = True,
    with_llama_cpp: bool = True,
    device: torch.device | None = None,
    seconds: float = math.inf,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[list[Row], Crossover | None]:
    """ms per token of transformers, transformers compiled, this package at each sparsity, and llama.cpp.

    All engines hold weights of one shape and take turns; a time is the median over the rounds of
    ``generate(n) - generate(1)`` per token, so that the prompt is left out.

    Args:
        config_name: a shape of :data:`lte.bench.shapes.SHAPES`, with random weights and routers set to each sparsity.
        model_folder: a trained sparse model instead, at the sparsity it has.
        dtype: ``fp32``, ``bf16`` or ``fp16``.
        sparsities: FFN sparsities; rows report the one reached on the decoded tokens.
        batch: sequences decoded together.
        new_tokens, rounds: tokens per turn, turns per engine.
        method: of a random model; linear routers on experts of 32 by default.
        weights: bits of the weights of further models of the shape; llama.cpp then runs such formats too.
        plain: whether the model in ``dtype`` and transformers on it run too; without, no such copy is held.
        bits_per_token: of an FFN weight, for models in two planes: neurons are left out, coarse or exact.
        compiled: whether to measure ``torch.compile`` too, which takes a minute or more to compile.
        with_llama_cpp: whether to measure llama.cpp, where ``llama-cpp-python`` and ``gguf`` are installed.
        device: CPU by default.
        seconds: after which no further engine is warmed up; rows say which were left out.
        progress: told what is being done.
    """
    deadline = time.perf_counter() + seconds
    device = device or torch.device("cpu")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    if batch < 1 or not 2 <= new_tokens <= MOST_TOKENS or rounds < 1:
        raise ConfigError(
            f"batch={batch}, new_tokens={new_tokens}, rounds={rounds}: at least 1, 2 and 1, no more than {MOST_TOKENS}"
        )
    if model_folder is None and method is not None and method.sparsity_is != "threshold":
        raise ConfigError(
            f"method={method.method!r} cannot be timed on random weights, which no threshold brings to a sparsity; "
            "make a model with lte sparsify, and give --model"
        )
    check_sparsities(sparsities)
    method = method or LTEConfig(expert_size=32)
    if bits_per_token and not (weights and picks_neurons(method)):
        raise ConfigError("bits per token are of weights in two planes; give --method self-prediction and --weights")
    if model_folder is not None and weights:
        raise ConfigError("weights of few bits are timed on random models; give a model of `lte quantize` as --model")
    if not (plain or weights):
        raise ConfigError("no weights to time; name some, for instance --weights int4")
    generator = torch.Generator().manual_seed(0)
    engines: list[Engine] = []
    benches: list[_Bench] = []
    with ExitStack() as stack:
        if plain:
            progress("building the model")
            started = time.perf_counter()
            if model_folder is None:
                model = random_model(model_config(config_name), DTYPES[dtype], device, method)
            else:
                model = load(model_folder, dtype=DTYPES[dtype]).to(device).eval()
                sparsities = (-1.0,)
                if any(ffn.removed for ffn in sparse_ffns(model)):
                    raise ConfigError(f"{model_folder} is a pruned model, whose dense twin is another; use lte compare")
            config = model.config
        else:
            config = model_config(config_name)
        ids = torch.randint(1, config.vocab_size, (batch, PROMPT_TOKENS), generator=generator).to(device)
        calibration = torch.randint(1, config.vocab_size, (1, 256), generator=generator).to(device)
        count = decode_bytes(
            config, weight_bytes=DTYPES[dtype].itemsize, context=batch * (PROMPT_TOKENS + new_tokens // 2)
        )
        if plain:
            progress("measuring where dense wins")
            benches.append(_Bench(model, ids, count, new_tokens, started))
            engines += benches[0].dense_engines(compiled, progress)
            engines += [benches[0].sparse_engine(sparsity, calibration, progress) for sparsity in sparsities]
        for bits in weights:
            progress(f"building the model of {bits} bits")
            started = time.perf_counter()
            kind = {"by_neuron": picks_neurons(method), "by_need": bool(bits_per_token)}
            rounded = weights_config(bits, **kind, tied=config.tie_word_embeddings)
            small = random_model(model_config(config_name), DTYPES[dtype], device, method, weights=rounded)
            benches.append(_Bench(small, ids, _of_bits(count, rounded), new_tokens, started))
            engines += [benches[-1].sparse_engine(sparsity, calibration, progress) for sparsity in sparsities]
            if rounded.coarse is not None:
                engines += [benches[-1].precise_engine(wanted, calibration, progress) for wanted in bits_per_token]
        for engine in engines:
            engine.row["limit_speedup"] = count.dense / engine.n_bytes
        if with_llama_cpp and batch == 1:
            engines += _llama_cpp_engines(benches[0], dtype, weights, plain, stack, progress)
        model = benches[0].model
        limits = _take_turns(engines, model, new_tokens, rounds, deadline, progress)
    return _finish(engines, limits), getattr(model, "lte_crossover", None)


TURNS = 3
"""Of :func:`time_beside`."""


@torch.no_grad()
def time_beside(model: Any | None, dense: Any, ids_BS: Tensor, new_tokens: int) -> dict[str, Any]:
    """ms per token of ``generate``, of a model made sparse and of the stock one it was, by turns; medians.

    Args:
        model: sparse, prepared for inference here; None to time the dense one alone.
        dense: the stock model in the same dtype; given to the kernels here.
        ids_BS: a text whose beginning is the prompt.
        new_tokens: tokens per turn.

    Returns:
        ``dense_ms_per_token``, of transformers; ``kernels_dense_ms_per_token``, of the dense model through the kernels
        of this package; of a sparse model ``ms_per_token`` and ``path`` (what runs it); and ``dtype``.
    """
    fast = sparsify(copy.deepcopy(dense), DenseConfig())
    engines = {"dense_ms_per_token": dense.eval(), "kernels_dense_ms_per_token": prepare_for_inference(fast)}
    about: dict[str, Any] = {"dtype": str(dense.dtype).removeprefix("torch.")}
    if model is not None:
        engines["ms_per_token"] = prepare_for_inference(model)
        impl, _ = sparse_ffns(model)[0].choose_path(1)
        about["path"] = _fused(model) or ("masked dense" if impl == "reference" else "FFN kernels")
    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(TURNS):
        for name, engine in engines.items():
            times[name].append(1e3 * generate_seconds(engine, ids_BS[:, :PROMPT_TOKENS], new_tokens))
    return {name: median(each) for name, each in times.items()} | about


def _fused(model: Any) -> str:
    step = model.__dict__.get("forward")
    if not isinstance(step, DecodeStep):
        return ""
    return "fused step, PyTorch decides" if step.stops() else "fused step"


class _Bench:
    def __init__(self, model: Any, ids: Tensor, count: DecodeBytes, new_tokens: int, started: float) -> None:
        """Prepare a model that was begun at some time, and have its first token."""
        self.model, self.ids, self.new_tokens = prepare_for_inference(model), ids, new_tokens
        self.count = replace(count, router=sum(ffn.router.cost().bytes for ffn in sparse_ffns(model)))
        generate_seconds(model, ids, 1)
        first_token, peak = time.perf_counter() - started, peak_memory().get("host")
        ffn = sparse_ffns(model)[0]
        weights = planes_of(ffn) if ffn.is_nested else ffn.quantized() or ffn.weights()
        dtype = {v: k for k, v in DTYPES.items()}[model.dtype]
        self.common = {
            "d_model": weights.d_model,
            "d_ff": weights.d_ff,
            "dtype": dtype,
            "weights": dtype if isinstance(weights, FFNWeights) else f"int{weights.bits}",
            "tokens": len(ids),
            "threads": torch.get_num_threads(),
            "status": "ok",
            "max_error": None,
        }
        self.memory = {
            "first_token_s": first_token,
            "peak_gb": peak,
            "weights_gb": sum(t.nbytes for t in model.state_dict().values()) / 1e9,
        }

    def dense_engines(self, compiled: bool, progress: Callable[[str], None]) -> list[Engine]:
        """transformers, eager and compiled, on the same weights in their stock layout."""
        progress("building the dense baseline")
        dense = dense_twin(self.model)
        name = f"transformers {versions()['transformers']}, torch {versions()['torch']}"
        common = {**self.common, "sparsity": 0.0, "version": name}
        engines = [
            Engine(
                {"engine": "transformers", **common, "backend": "torch eager"},
                lambda n: generate_seconds(dense, self.ids, n),
                self.count.dense,
            )
        ]
        if compiled:
            row = {"engine": "transformers-compiled", **common, "backend": "torch.compile, static cache"}
            engine = Engine(row, lambda n: generate_seconds(dense, self.ids, n, static=True), self.count.dense)
            progress("torch.compile of the dense baseline")
            _warm_up(engine, self.new_tokens)
            engines.append(engine)
        return engines

    def sparse_engine(self, sparsity: float, calibration: Tensor, progress: Callable[[str], None]) -> Engine:
        """The prepared model at one sparsity; below 0: as it was trained."""
        progress("setting the routers" if sparsity < 0 else f"setting the routers to sparsity {sparsity:g}")
        model = self.model
        if sparsity >= 0:
            leave_out(model, sparsity, calibration)
        return self._engine()

    def precise_engine(self, bits: float, calibration: Tensor, progress: Callable[[str], None]) -> Engine:
        """The same where a token reads so many bits of an FFN weight in the mean."""
        progress(f"setting thresholds for {bits:g} bits")
        set_bits_per_token(self.model, [{"input_ids": calibration}], bits)
        engine = self._engine()
        engine.row["weights"] += f" at {bits:g}"
        return engine

    def _engine(self) -> Engine:
        model = self.model
        prepare = thresholds_again(model)
        logits = check_logits(model, self.ids, self.new_tokens)
        error = ffn_error(model, len(self.ids))
        path = sparse_ffns(model)[0].choose_path(len(self.ids))[0]
        path = model.lte_crossover.backend if path == "fastest" else path
        row: Row = {
            "engine": "lte",
            **self.common,
            **self.memory,
            "sparsity": logits.sparsity,
            "backend": ", ".join(filter(None, (path, _fused(model)))),
            "max_error": error,
            "tolerance": tolerances(model)[0],
            "logits_error": logits.error,
            "logits_noise": logits.noise,
            "logits_tolerance": logits.allowed,
            "version": f"lte {versions()['lte']}",
        }
        for kind in ("", "logits_"):
            found, allowed = row[f"{kind}error" if kind else "max_error"], row[f"{kind}tolerance"]
            if not found <= allowed:
                row["status"] = f"failed: {kind or 'FFN '}error {found:.2g} above {allowed:.2g}"
        static = model.device.type == "cuda"
        return Engine(
            row,
            lambda n: generate_seconds(model, self.ids, n, static=static),
            self._bytes(logits.sparsity),
            prepare,
        )

    def _bytes(self, sparsity: float) -> float:
        if sparse_ffns(self.model)[0].is_nested:
            cost, layers = model_cost(self.model), len(sparse_ffns(self.model))
            return self.count.cache + cost.bytes_per_token([sparsity] * layers)["sparse"]
        return self.count.sparse(sparsity, router=sparsity > 0)


class _Clock(BaseStreamer):
    """When ``generate`` had each token on the host, its prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate_seconds(model: Any, ids_BS: Tensor, new_tokens: int, *, static: bool = False) -> float:
    """Median seconds from one token of ``generate`` to the next, the prompt and the first token left out."""
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "use_cache": True, "eos_token_id": _no_end(model)}
    if static:
        compile_config = CompileConfig(mode="default" if ids_BS.device.type == "cpu" else "reduce-overhead")
        compile_config._compile_all_devices = True
        options |= {"cache_implementation": "static", "compile_config": compile_config}
    config = GenerationConfig(max_new_tokens=1 + new_tokens, **options)
    clock = _Clock()
    # Thresholds are numbers: a graph for each setting, not one that takes them as inputs.
    with torch._dynamo.config.patch(specialize_float=True):
        model.generate(ids_BS, attention_mask=torch.ones_like(ids_BS), generation_config=config, streamer=clock)
    return median(after - before for before, after in pairwise(clock.times[1:]))


def _no_end(model: Any) -> int:
    """A token there is not, for texts to end at; a least number of tokens would have all logits looked through."""
    return int(model.config.get_text_config().vocab_size)


def _of_bits(count: DecodeBytes, weights: WeightsConfig) -> DecodeBytes:
    """Of the same shape with weights of few bits, for numbers of 16."""
    share = (weights.bits + 16 / weights.group) / 16
    sizes = {name: round(getattr(count, name) * share) for name in ("attention", "ffn", "head")}
    return replace(count, **sizes)


def _llama_cpp_engines(
    bench: _Bench,
    dtype: str,
    weights: Sequence[int],
    plain: bool,
    stack: ExitStack,
    progress: Callable[[str], None],
) -> list[Engine]:
    if bench.ids.device.type != "cpu":
        return []
    config = dense_config(bench.model)
    row: Row = {"engine": "llama.cpp", **bench.common, "sparsity": 0.0, "backend": "ggml"}
    whole = bench.count.dense if plain else _of_bits(bench.count, weights_config(max(weights), by_neuron=False)).dense
    reason = llama_cpp.obstacle(config, dtype, whole)
    row["version"] = reason or llama_cpp.description()
    if reason:
        row["status"] = f"left out: {reason}"
        return [Engine(row, lambda n: 0.0, bench.count.dense)]
    engines = []
    formats = [name for bits in weights for name in llama_cpp.FORMATS.get(bits, ())]
    progress("writing the model for llama.cpp")
    file = stack.enter_context(llama_cpp.model_file(config, DTYPES[dtype]))
    for name in ("", *formats) if plain else formats:
        progress(f"opening the model in llama.cpp {name}")
        engine = stack.enter_context(llama_cpp.LlamaCpp(file, config, 512, name))

        def seconds(n: int, engine: llama_cpp.LlamaCpp = engine) -> float:
            return engine.seconds_per_token(PROMPT_TOKENS, n)

        read = engine.bytes_per_token or bench.count.dense
        engines.append(Engine({**row, "weights": name or dtype}, seconds, read))
    return engines


def _take_turns(
    engines: list[Engine],
    model: Any,
    new_tokens: int,
    rounds: int,
    deadline: float,
    progress: Callable[[str], None],
) -> list[float]:
    """Fill ``times`` of every engine; return the read (copy) bandwidth measured in each round."""
    limits = []
    held = list(model.state_dict().values())
    large = [tensor for tensor in held if tensor.numel() >= 1 << 20] or held
    cpu = model.device.type == "cpu"
    for number in range(rounds + 1):
        for engine in engines:
            if engine.row["status"] != "ok":
                continue
            progress(f"round {number} of {rounds}: {engine.row['engine']}")
            engine.prepare()
            if number:
                engine.times.append(engine.seconds(new_tokens))
            elif time.perf_counter() > deadline:
                engine.row["status"] = "left out: no time left"
            else:
                _warm_up(engine, new_tokens if model.device.type == "cuda" else 2)
        limits.append(read_gbytes_per_s(large) if cpu else copy_gbytes_per_s(model.device))
    return limits[1:]


def _warm_up(engine: Engine, new_tokens: int) -> None:
    """Run an engine once, which may compile it; its row says what went wrong."""
    try:
        engine.seconds(new_tokens)
    except Exception as error:  # noqa: BLE001 - whatever the compiler lacks, the others are still worth having
        engine.row["status"] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _finish(engines: list[Engine], limits: list[float]) -> list[Row]:
    measured = [engine for engine in engines if engine.times]
    named = {engine.row["engine"]: engine for engine in reversed(measured)}
    rivals = {engine.row["weights"]: engine for engine in measured if engine.row["engine"] == "llama.cpp"}
    limit = median(limits)
    rows = []
    for engine in engines:
        row = dict(engine.row)
        bits = row["weights"].removeprefix("int")
        names = llama_cpp.FORMATS.get(int(bits), ()) if bits.isdigit() else (row["dtype"],)
        llama = min((rivals[name] for name in names if name in rivals), key=lambda e: median(e.times), default=None)
        if engine.times:
            seconds, eager = median(engine.times), named.get("transformers")
            row |= {
                "ms_per_token": seconds * 1e3,
                "dense_ms": None if eager is None else median(eager.times) * 1e3,
                "sparse_ms": seconds * 1e3 if row["engine"] == "lte" else None,
                "speedup": _times_as_fast(engine, eager),
                "speedup_over_compiled": _times_as_fast(engine, named.get("transformers-compiled")),
                "speedup_over_llama_cpp": _times_as_fast(engine, llama),
                "bytes_moved": int(engine.n_bytes),
                "gbytes_per_s": engine.n_bytes / seconds / 1e9,
                "limit_gbytes_per_s": limit,
                "share_of_limit": engine.n_bytes / seconds / 1e9 / limit,
                "ms_per_token_rounds": [t * 1e3 for t in engine.times],
            }
        rows.append(row)
    return rows


def _times_as_fast(engine: Engine, as_other: Engine | None) -> float | None:
    """Median over the rounds: memory may be slower for minutes, and is so for all that take turns in them."""
    if as_other is None:
        return None
    return median(other / own for own, other in zip(engine.times, as_other.times, strict=True))


@torch.no_grad()
def decode_tokens_per_second(
    models: Mapping[str, Any], prompt_ids: torch.Tensor, *, new_tokens: int = 64, repeats: int = 3
) -> dict[str, float]:
    """Median tokens/s of ``generate``, batch 1, greedy, with the KV cache; models take turns within one run.

    Args:
        models: name -> model.
        prompt_ids: [1, S].
        new_tokens: tokens generated per repeat; the end-of-text token does not stop a model.
        repeats: timed rounds, after one that is not.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    for round_number in range(repeats + 1):
        for name, model in models.items():
            started = time.perf_counter()
            model.generate(
                prompt_ids,
                attention_mask=torch.ones_like(prompt_ids),
                max_new_tokens=new_tokens,
                eos_token_id=_no_end(model),
                do_sample=False,
            )
            if prompt_ids.device.type == "cuda":
                torch.cuda.synchronize()
            if round_number:
                times[name].append(time.perf_counter() - started)
    return {name: new_tokens / median(values) for name, values in times.items()}
