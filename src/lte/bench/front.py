"""Quality against bits read and against time: a model of ours at several widths beside llama.cpp's formats of it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from lte.accounting import model_cost
from lte.activations import every_nth, sample_batches
from lte.bench import llama_cpp
from lte.bench.decode import MOST_TOKENS, PROMPT_TOKENS, generate_seconds
from lte.bench.rows import Row
from lte.errors import ConfigError, LTEError
from lte.hub import load_dense, load_tokenizer
from lte.inference import prepare_for_inference
from lte.methods import DenseConfig
from lte.nn import SparsityMeter, observe_routing, sparse_ffns
from lte.ops import SMALL_BATCH
from lte.quantization import quantize, read_on_average
from lte.sparsify import sparsify
from lte.tasks import Task
from lte.tuning import STEP_TOKENS, batches_per_step, tune_quantized
from lte.versions import versions


@dataclass
class Engine:
    """What is measured: predictions of a window of tokens, and seconds of a decoded one."""

    row: Row
    logits: Callable[[Tensor], Tensor]
    seconds: Callable[[int], float]
    meter: SparsityMeter | None = None
    model: Any = None
    times: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Width:
    """``int4``, or ``int4@3.2``: some bits, of which a token reads so many in the mean."""

    bits: int
    bits_per_token: float | None

    @classmethod
    def parse(cls, text: str) -> Width:
        """ConfigError for anything else."""
        found = re.fullmatch(r"int([1-8])(?:@(\d+(?:\.\d+)?))?", text)
        if found is None:
            raise ConfigError(f"{text!r} is no width; there are int1 to int8, and int4@3.2 for 3.2 bits by need")
        return cls(int(found[1]), None if found[2] is None else float(found[2]))

    @property
    def name(self) -> str:
        """As it was written."""
        return f"int{self.bits}" + ("" if self.bits_per_token is None else f"@{self.bits_per_token:g}")


@torch.no_grad()
def bench_front(
    path: str,
    data: str,
    eval_data: str,
    task: Task,
    *,
    ours: Sequence[Width],
    formats: Sequence[str] = (),
    steps: int = 0,
    trained: Sequence[Width] | None = None,
    learning_rate: float | None = None,
    tokens: int = 8192,
    eval_tokens: int = 8192,
    group: int = 64,
    head_bits: int | None = 8,
    new_tokens: int = 32,
    rounds: int = 3,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Rows of the dense model in bfloat16, of ours, and of llama.cpp's formats: same weights, same tokens.

    Args:
        path: a dense model; of the Llama shape for llama.cpp.
        data: text by which weights are rounded and scales trained.
        eval_data: text whose tokens are predicted, in windows of the task's context length.
        task: how to read both.
        ours: widths.
        formats: of llama.cpp; none where ``llama-cpp-python`` is not installed.
        steps: of training the scales; with some, a width has a row before and one after.
        trained: the widths that is done for, of ``ours``; None for all.
        learning_rate: of these; None for one that suits the bits.
        tokens: of ``data``, for rounding.
        eval_tokens: tokens predicted.
        group, head_bits: of ours.
        new_tokens, rounds: of the timing, all engines taking turns.
        progress: told what is being done.
    """
    if not 2 <= new_tokens <= MOST_TOKENS or rounds < 1:
        raise ConfigError(f"new_tokens={new_tokens}, rounds={rounds}: at least 2 and 1, at most {MOST_TOKENS} tokens")
    if trained is not None and (wrong := next((width for width in trained if width not in ours), None)):
        raise ConfigError(f"{wrong.name} is to be trained, and is not among the widths")
    tokenizer = load_tokenizer(path)
    batches = sample_batches(task.prepare(data, tokenizer), task.collator(tokenizer), tokens + steps * STEP_TOKENS)
    rounding = every_nth(batches, tokens)
    rows = task.prepare(eval_data, tokenizer)
    if not len(rows):
        raise ConfigError(f"{eval_data} has less text than one window of {task.config.context_length} tokens")
    count = min(len(rows), -(-eval_tokens // len(rows[0]["input_ids"])))
    windows = [torch.tensor(row["input_ids"]) for row in rows.select(range(count))]
    stock = load_dense(path, dtype=torch.bfloat16).eval()
    prompt = windows[0][None, :PROMPT_TOKENS]
    whole = model_cost(stock).dense_bytes
    with ExitStack() as stack:
        engines = [_ours(prepare_for_inference(sparsify(copy.deepcopy(stock), DenseConfig())), "bf16", 0, prompt)]
        for width in ours:
            progress(f"{width.name}: rounding")
            model = quantize(
                copy.deepcopy(stock),
                bits=width.bits,
                group=group,
                head_bits=head_bits,
                bits_per_token=width.bits_per_token,
                calibration=rounding,
            )
            engines.append(_ours(prepare_for_inference(copy.deepcopy(model)), width.name, 0, prompt))
            if steps and (trained is None or width in trained):
                progress(f"{width.name}: {steps} steps")
                per_step = batches_per_step(batches)
                with torch.enable_grad():
                    tune_quantized(model, stock, batches, steps, accumulation=per_step, learning_rate=learning_rate)
                if width.bits_per_token is not None:
                    read_on_average(model, rounding, width.bits_per_token)
                engines.append(_ours(prepare_for_inference(model), width.name, steps, prompt))
        if formats:
            progress("llama.cpp: writing the model")
            file = _file(stock, stack)
            for name in ("", *formats):
                progress(f"llama.cpp {name or 'bf16'}: opening")
                engines.append(_llama_cpp(file, stock, name, len(windows[0]), stack))
        for engine in engines:
            if engine.row["status"] == "ok":
                progress(f"{engine.row['engine']} {engine.row['weights']}: predicting")
                engine.row |= _quality(engine, stock, windows)
                read = engine.row.pop("bytes", None) or _read(engine)
                engine.row |= {"mbytes": read / 1e6, "bits_per_weight": 16 * read / whole}
        _take_turns(engines, new_tokens, rounds, progress)
    dense = engines[0].row["loss"]
    for engine in engines:
        if "loss" in engine.row:
            engine.row["above_dense"] = engine.row["loss"] - dense
    return [engine.row for engine in engines]


def _ours(model: Any, name: str, steps: int, prompt: Tensor) -> Engine:
    row: Row = {"engine": "lte", "weights": name, "steps": steps, "status": "ok", "version": f"lte {versions()['lte']}"}

    meter = SparsityMeter(len(sparse_ffns(model)))

    def logits(ids_S: Tensor) -> Tensor:
        # In pieces that go through the kernels, as decoding does: inputs in 8 bits where weights are of few.
        cache, found = DynamicCache(config=model.config), []
        for piece in ids_S[None].split(SMALL_BATCH, 1):
            meter.set_token_mask(torch.ones_like(piece, dtype=torch.bool))
            found.append(model(piece, past_key_values=cache, use_cache=True).logits[0])
        return torch.cat(found)

    return Engine(row, logits, lambda n: generate_seconds(model, prompt, n), meter, model)


def _file(stock: Any, stack: ExitStack) -> Path | str:
    """The model as llama.cpp reads it, or why there is none."""
    try:
        return llama_cpp.missing() or stack.enter_context(llama_cpp.model_file(stock.config, torch.bfloat16, stock))
    except LTEError as error:
        return str(error)


def _llama_cpp(file: Path | str, stock: Any, name: str, context: int, stack: ExitStack) -> Engine:
    row: Row = {"engine": "llama.cpp", "weights": name or "bf16", "steps": 0, "status": "ok"}
    row["version"] = llama_cpp.missing() or llama_cpp.description()
    try:
        if isinstance(file, str):
            raise LTEError(file)
        made = llama_cpp.LlamaCpp(file, stock.config, context, name, all_logits=True)
        engine = stack.enter_context(made)
    except (LTEError, AttributeError, ValueError) as error:
        row["status"] = f"left out: {str(error)[:120]}"
        return Engine(row, lambda ids: ids, lambda n: 0.0)
    row["bytes"] = engine.bytes_per_token or model_cost(stock).dense_bytes
    return Engine(row, engine.logits, lambda n: engine.seconds_per_token(PROMPT_TOKENS, n))


def _quality(engine: Engine, stock: Any, windows: Sequence[Tensor]) -> Row:
    loss = divergence = 0.0
    same = count = 0
    for ids_S in windows:
        wanted = stock(ids_S[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
        if engine.meter is None:
            found = engine.logits(ids_S)
        else:
            with observe_routing(engine.model, engine.meter):
                found = engine.logits(ids_S)
        found = found[:-1].float().log_softmax(-1)
        loss += float(F.nll_loss(found, ids_S[1:], reduction="sum"))
        divergence += float((wanted.exp() * (wanted - found)).sum())
        same += int((wanted.argmax(-1) == found.argmax(-1)).sum())
        count += len(found)
    return {"loss": loss / count, "kl_divergence": divergence / count, "same_top": same / count, "tokens": count}


def _read(engine: Engine) -> float:
    """Bytes of weights a token reads, with the neurons left out that were on these tokens."""
    assert engine.meter is not None
    return model_cost(engine.model).bytes_per_token(engine.meter.per_layer)["sparse"]


def _take_turns(engines: Sequence[Engine], new_tokens: int, rounds: int, progress: Callable[[str], None]) -> None:
    for number in range(rounds + 1):
        progress(f"timing, round {number} of {rounds}")
        for engine in engines:
            if engine.row["status"] == "ok":
                seconds = engine.seconds(new_tokens if number else 2)
                if number:
                    engine.times.append(seconds)
    for engine in engines:
        if engine.times:
            engine.row["ms_per_token"] = median(engine.times) * 1e3
