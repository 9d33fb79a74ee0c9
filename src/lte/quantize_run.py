"""``lte quantize``: a checkpoint in, one of few bits out."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lte.accounting import model_cost
from lte.activations import every_nth, sample_batches
from lte.errors import ConfigError
from lte.files import made_beside, write_whole
from lte.hub import default_device, is_sparse_config, load, load_dense, load_tokenizer, read_config
from lte.quantization import quantize, read_on_average
from lte.run_folder import RUN_FILE
from lte.tasks import Task
from lte.thresholds import DIAL_TOKENS
from lte.tuning import LEARNING_RATE, STEP_TOKENS, batches_per_step, check_steps, tune_quantized
from lte.versions import versions


def quantize_checkpoint(
    path: str,
    out: Path,
    wanted: Mapping[str, Any],
    *,
    data: str | None = None,
    task: Task,
    tokens: int = DIAL_TOKENS,
    steps: int = 0,
    learning_rate: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Save a model, sparse or dense, with weights of few bits.

    Args:
        path: folder, hub id or ``.gguf`` file.
        out: new folder.
        wanted: arguments of :func:`lte.quantize`.
        data: text by which weights are rounded; None rounds every one by itself.
        task: how to read it.
        tokens: how much of it is used.
        steps: of :func:`lte.tune_quantized` afterwards, of 2048 tokens each, which are further ones where there are.
        learning_rate: of these; None for one that suits the bits.
        progress: called with layers and steps done, and in all.

    Returns:
        ``bytes_per_token`` of the model before and after, none of its neurons left out, ``losses`` of the steps, and
        ``seconds``.
    """
    if steps and data is None:
        raise ConfigError(f"steps={steps} need data to train on; give --data")
    if steps:
        check_steps(steps, LEARNING_RATE if learning_rate is None else learning_rate)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(f"out={str(out)!r} is there already; give a new folder")
    started = time.perf_counter()
    tokenizer = load_tokenizer(path)
    batches = None
    if data is not None:
        wanted_tokens = tokens + steps * STEP_TOKENS
        batches = sample_batches(task.prepare(data, tokenizer), task.collator(tokenizer), wanted_tokens)
        random.Random(0).shuffle(batches)
    rounding = every_nth(batches, tokens) if batches else None
    sparse = is_sparse_config(read_config(path))

    def read() -> Any:
        return (load(path) if sparse else load_dense(path, task.auto_class, dtype="auto")).to(default_device())

    def show(done: int, total: int, before: int = 0) -> None:
        if progress is not None:
            progress(before + done, before + total + (0 if before else steps))
        layers[0] = total

    model, layers, losses = read(), [0], list[float]()
    before = model_cost(model).dense_bytes
    quantize(model, **wanted, calibration=rounding, progress=show)
    if steps and batches:
        losses = tune_quantized(
            *(model, read().eval(), batches, steps),
            accumulation=batches_per_step(batches),
            learning_rate=learning_rate,
            progress=partial(show, before=layers[0]),
        )
        if rounding and wanted.get("bits_per_token") is not None:
            read_on_average(model, rounding, wanted["bits_per_token"])
    summary = {
        "model": path,
        "weights": dict(wanted),
        "data": data,
        "tokens": tokens if data is not None else 0,
        "bytes_per_token": {"before": before, "after": model_cost(model).dense_bytes},
        "losses": losses,
        "seconds": time.perf_counter() - started,
        **versions(),
    }
    with made_beside(out) as unfinished:
        for name in ("recipe.yaml", RUN_FILE):
            if sparse and (Path(path) / name).is_file():
                shutil.copy(Path(path) / name, unfinished / name)
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        write_whole(unfinished / "lte_quantize.json", json.dumps(summary, indent=2) + "\n")
    return summary
