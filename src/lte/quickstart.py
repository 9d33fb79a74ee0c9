"""The embedded default: a small model on the Python standard library's own text, dense and sparse side by side."""

from __future__ import annotations

import json
import logging
import random
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import GenerationConfig

from lte.bench.decode import decode_tokens_per_second
from lte.errors import ConfigError, DataError, check_seed
from lte.evaluate import evaluate, load_for_evaluation
from lte.files import unlock_folder, write_whole
from lte.generate import continue_text
from lte.inference import prepare_for_inference
from lte.models import EOS, create
from lte.nn import SparsityMeter, observe_routing
from lte.recipe import Recipe
from lte.report.figures import sparsity_figure
from lte.run_folder import forget_replaced, keep_folder, set_aside
from lte.runs import finetune, train
from lte.tasks import TaskConfig, build_task
from lte.thresholds import thresholds_of

MODEL = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
VOCAB_SIZE = 1024
CONTEXT = 128
BATCH = 8
PRETRAINING_STEPS = 400
STEPS = 300
LEARNING_RATE = 2e-3
TARGET_SPARSITY = 0.7
TRAIN_BYTES = 3_000_000
VALIDATION_BYTES = 120_000
PROMPT = "def read_file(path):\n"


def quickstart(out: Path, *, overwrite: bool, seed: int, console: Console) -> dict[str, Any]:
    """Pre-train, then spend the same number of further steps dense and sparse; print, draw and save the comparison.

    Args:
        out: folder; afterwards it holds ``sparse`` and ``dense`` (models), ``quickstart.json`` and
            ``quickstart.png``.
        overwrite: empty ``out`` first, if an earlier quickstart made it.
        seed: of weights, data order and routers.
        console: where the table goes.

    Returns:
        ``dense`` and ``sparse``, each with ``loss``, ``perplexity``, ``sparsity``, ``gflops_per_token``,
        ``bytes_per_token`` and ``tokens_per_s``; and ``seconds``.
    """
    check_seed(seed)
    started = time.perf_counter()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    _claim(out, overwrite)
    data = write_corpus(out / "data", seed=seed)
    console.print(f"1/4 text: {data['train']} ({TRAIN_BYTES / 1e6:.0f} MB of the Python standard library)")
    model, _ = create(MODEL, str(data["train"]), out / "start", vocab_size=VOCAB_SIZE, seed=seed)
    console.print(f"2/4 pre-training a dense LLaMA-style model of {model.num_parameters() / 1e6:.1f} M parameters")
    task = TaskConfig(name="lm", context_length=CONTEXT)
    common: dict[str, Any] = {"data": str(data["train"]), "task": task, "seed": seed}
    optimiser: dict[str, Any] = {
        "per_device_train_batch_size": BATCH,
        "learning_rate": LEARNING_RATE,
        "adam_beta2": 0.95,
        "save_strategy": "no",
    }
    warm = {"lr_scheduler_type": "constant_with_warmup", "max_steps": PRETRAINING_STEPS}
    finetune(Recipe(model=str(out / "start"), out=str(out / "pretrained"), training={**optimiser, **warm}, **common))
    console.print("3/4 going on dense, as the baseline")
    steps = {"max_steps": STEPS}
    finetune(Recipe(model=str(out / "pretrained"), out=str(out / "dense"), training={**optimiser, **steps}, **common))
    console.print(f"4/4 the same steps with lte: target sparsity {TARGET_SPARSITY:.0%}")
    target = {**steps, "target_sparsity": TARGET_SPARSITY}
    train(Recipe(model=str(out / "pretrained"), out=str(out / "sparse"), training={**optimiser, **target}, **common))
    result = _compare(out, str(data["validation"]), task, seed, console)
    result["seconds"] = round(time.perf_counter() - started, 1)
    write_whole(out / RESULT, json.dumps(result, indent=2) + "\n")
    forget_replaced(out, mark=MARK)
    unlock_folder(out)
    console.print(
        f"{result['seconds']:.0f} s. Model: {out / 'sparse'}; figure: {out / 'quickstart.png'}; "
        f"numbers: {out / RESULT}. Next: lte generate {out / 'sparse'} --prompt 'import '"
    )
    return result


def write_corpus(folder: Path, *, seed: int) -> dict[str, Path]:
    """Write train.txt and validation.txt from the standard library's sources, split by file.

    Raises:
        DataError: this Python comes without the sources of its library.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idlelib", "site-packages", "__pycache__", "lib2to3"}
    files = sorted(path for path in library.rglob("*.py") if not skipped & set(path.relative_to(library).parts))
    random.Random(seed).shuffle(files)
    folder.mkdir(parents=True)
    written = {}
    for name, wanted in (("validation", VALIDATION_BYTES), ("train", TRAIN_BYTES)):
        pieces: list[str] = []
        while files and sum(map(len, pieces)) < wanted:
            pieces.append(files.pop().read_text(encoding="utf-8", errors="replace"))
        text = f"\n{EOS}\n".join(pieces)[:wanted]
        if len(text) < wanted / 2:
            raise DataError(
                f"found too few Python sources in {library} to train on; use a Python with its library's sources"
            )
        written[name] = folder / f"{name}.txt"
        written[name].write_text(text, encoding="utf-8")
    return written


MARK = "made-by-lte-quickstart"
"""A file of the folder, empty: everything beside it is ours."""

RESULT = "quickstart.json"


def _claim(out: Path, overwrite: bool) -> None:
    """Make the folder; what was there, of an earlier quickstart, stays beside it until this one is complete."""
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise ConfigError(f"out folder {str(out)!r} is not empty; use --overwrite or another --out")
        if not (out / MARK).is_file():
            raise ConfigError(f"folder {str(out)!r} was not made by the quickstart; empty it yourself")
        keep_folder(out)
        set_aside(out, mark=MARK, record=RESULT)
    out.mkdir(parents=True, exist_ok=True)
    keep_folder(out)
    (out / MARK).touch()


def _compare(out: Path, data: str, config: TaskConfig, seed: int, console: Console) -> dict[str, Any]:
    task = build_task(config)
    loaded = {name: load_for_evaluation(str(out / name), task, dense=name == "dense") for name in ("dense", "sparse")}
    models = {name: model for name, (model, _) in loaded.items()}
    tokenizer = loaded["dense"][1]
    for model in models.values():
        model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id)
    results = {
        name: evaluate(model, tokenizer, task, data, dense=name == "dense", batch_size=16, seed=seed)
        for name, model in models.items()
    }
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    prepare_for_inference(models["sparse"])
    speed = decode_tokens_per_second(models, prompt)
    summary: dict[str, Any] = {
        name: {
            "loss": result["extras"]["cross_entropy"],
            "perplexity": result["value"],
            "sparsity": result["sparsity"],
            "gflops_per_token": result["gflops_per_token"]["sparse"],
            "bytes_per_token": result["bytes_per_token"]["sparse"],
            "tokens_per_s": speed[name],
        }
        for name, result in results.items()
    }
    summary["completions"] = {
        name: continue_text(model, tokenizer, PROMPT, max_new_tokens=48) for name, model in models.items()
    }
    summary["sparsity_per_layer"] = results["sparse"]["sparsity_per_layer"]
    summary["versions"] = results["sparse"]["versions"]
    _draw(models["sparse"], tokenizer, data, out / "quickstart.png")
    _print(summary, console)
    return summary


def _draw(model: Any, tokenizer: Any, data: str, file: Path) -> None:
    """Sparsity per layer and the histogram of scores over the first validation tokens."""
    ids = tokenizer(Path(data).read_text(encoding="utf-8")[:16_000], return_tensors="pt")["input_ids"]
    ids = ids[:, : ids.shape[1] // CONTEXT * CONTEXT].view(-1, CONTEXT)
    meter = SparsityMeter(model.config.num_hidden_layers, bins=50)
    meter.set_token_mask(torch.ones_like(ids, dtype=torch.bool))
    with torch.no_grad(), observe_routing(model, meter):
        model(input_ids=ids)
    sparsity_figure(meter.per_layer, meter.histogram.tolist(), thresholds_of(model)[0], file)


def _print(summary: dict[str, Any], console: Console) -> None:
    table = Table("", "dense", "sparse (lte)", title="same data, same number of steps")
    rows = {
        "validation loss (nats)": ("loss", "{:.3f}"),
        "perplexity": ("perplexity", "{:.1f}"),
        "FFN sparsity": ("sparsity", "{:.1%}"),
        "bytes read per token": ("bytes_per_token", "{:,.0f}"),
        "decode tokens/s": ("tokens_per_s", "{:.0f}"),
    }
    for title, (key, form) in rows.items():
        table.add_row(title, form.format(summary["dense"][key]), form.format(summary["sparse"][key]))
    console.print(table)
    for name, text in summary["completions"].items():
        console.print(f"[bold]{name}[/]:")
        console.print(text, markup=False, highlight=False, soft_wrap=True)
