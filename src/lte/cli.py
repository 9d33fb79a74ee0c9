"""The ``lte`` command: parse, call, print."""

# Commands import what they need themselves: datasets and matplotlib take seconds to load.

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from lte.errors import ConfigError, LTEError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench_app = typer.Typer(help="Measure speed.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
console = Console(soft_wrap=True)

RecipeFile = Annotated[Path | None, typer.Argument(help="YAML recipe; flags and --set win over it.")]
Set = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Any recipe key, e.g. training.eta=2.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")]
Model = Annotated[str | None, typer.Option(help="Dense model: folder or hub id.")]
Data = Annotated[str | None, typer.Option(help="Training data: file, folder or hub name.")]
TaskName = Annotated[str | None, typer.Option(help="lm (text, prompt -> target, chat) or classify.")]
Out = Annotated[str | None, typer.Option(help="Folder for the result.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint in --out.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Empty --out first.")]
ContextLength = Annotated[int | None, typer.Option(help="Tokens per block, window or row.")]
PromptColumn = Annotated[str | None, typer.Option(help="Column of the prompt.")]
TargetColumn = Annotated[str | None, typer.Option(help="Column of the target; the loss is on it alone.")]
TextColumn = Annotated[str | None, typer.Option(help="Column of the text.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column of the label (classify).")]
TextPairColumn = Annotated[str | None, typer.Option(help="Column of a second text (classify).")]
MessagesColumn = Annotated[str | None, typer.Option(help="Column of a chat's messages.")]
Split = Annotated[str | None, typer.Option(help="Split of a folder or hub dataset.")]
Limit = Annotated[int | None, typer.Option(help="Use only the first rows.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything that is drawn.")]
LearningRate = Annotated[float | None, typer.Option(help="Learning rate of the model.")]
BatchSize = Annotated[int | None, typer.Option(help="Rows per step and device.")]


@app.callback()
def lte() -> None:
    """Turn a dense Hugging Face transformer into a contextually sparse one, and run it."""
    # Progress is shown by the commands, not by each library on its own.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.disable_progress_bar()


@app.command()
def train(
    recipe: RecipeFile = None,
    model: Model = None,
    task: TaskName = None,
    data: Data = None,
    out: Out = None,
    eta: Annotated[float | None, typer.Option(help="Weight of the efficiency loss: larger is sparser.")] = None,
    expert_size: Annotated[int | None, typer.Option(help="Neurons per expert.")] = None,
    grouping: Annotated[str | None, typer.Option(help="kmeans, coactivation or random.")] = None,
    stage1_epochs: Annotated[float | None, typer.Option(help="Passes over the data in stage 1.")] = None,
    stage2_epochs: Annotated[float | None, typer.Option(help="Passes over the data in stage 2.")] = None,
    learning_rate: LearningRate = None,
    batch_size: BatchSize = None,
    context_length: ContextLength = None,
    prompt_column: PromptColumn = None,
    target_column: TargetColumn = None,
    text_column: TextColumn = None,
    text_pair_column: TextPairColumn = None,
    label_column: LabelColumn = None,
    messages_column: MessagesColumn = None,
    split: Split = None,
    limit: Limit = None,
    seed: Seed = None,
    settings: Set = [],  # noqa: B006
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Make a dense model sparse and train it: LTE's two stages."""
    from lte import runs
    from lte.recipe import load_recipe

    flags = {
        **_common_flags(locals()),
        "training.eta": eta,
        "training.stage1_epochs": stage1_epochs,
        "training.stage2_epochs": stage2_epochs,
        "sparsity.expert_size": expert_size,
        "sparsity.grouping": grouping,
    }
    loaded = load_recipe(recipe, flags, settings)
    with _resumable(loaded.out):
        summary = runs.train(loaded, resume=resume, overwrite=overwrite)
    sparsity = f", FFN sparsity {summary['sparsity']:.1%} on the last training batches" if "sparsity" in summary else ""
    console.print(
        f"[bold]{loaded.out}[/]: {summary['steps']} steps in {summary['seconds']:.0f} s{sparsity}. "
        f"Next: lte evaluate {loaded.out} --task {loaded.task.name} --data FILE"
    )


@app.command()
def finetune(
    recipe: RecipeFile = None,
    model: Model = None,
    task: TaskName = None,
    data: Data = None,
    out: Out = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    learning_rate: LearningRate = None,
    batch_size: BatchSize = None,
    context_length: ContextLength = None,
    prompt_column: PromptColumn = None,
    target_column: TargetColumn = None,
    text_column: TextColumn = None,
    text_pair_column: TextPairColumn = None,
    label_column: LabelColumn = None,
    messages_column: MessagesColumn = None,
    split: Split = None,
    limit: Limit = None,
    seed: Seed = None,
    settings: Set = [],  # noqa: B006
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune a dense model, or pre-train one made by `lte init`: the baseline on the same data."""
    from lte import runs
    from lte.recipe import load_recipe

    flags = {**_common_flags(locals()), "training.num_train_epochs": epochs}
    loaded = load_recipe(recipe, flags, settings)
    with _resumable(loaded.out):
        summary = runs.finetune(loaded, resume=resume, overwrite=overwrite)
    console.print(
        f"[bold]{loaded.out}[/]: {summary['steps']} steps in {summary['seconds']:.0f} s. "
        f"Next: lte train --model {loaded.out} ..., or lte evaluate {loaded.out} --dense ..."
    )


@app.command()
def init(
    config: Annotated[Path, typer.Option(help="A transformers config (JSON, with model_type).")],
    data: Annotated[str, typer.Option(help="Text the tokenizer is trained on.")],
    out: Annotated[Path, typer.Option(help="Folder for model and tokenizer.")],
    vocab_size: Annotated[int, typer.Option(min=300, help="Entries of the tokenizer.")] = 4096,
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
) -> None:
    """Make a new dense model with random weights and a tokenizer, to be pre-trained with `lte finetune`."""
    from lte.models import create

    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"out folder {str(out)!r} is not empty; choose another --out")
    model, tokenizer = create(config, data, out, vocab_size=vocab_size, seed=seed)
    console.print(f"[bold]{out}[/]: {model.num_parameters():,} parameters, {len(tokenizer)} tokens")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Sparse model: folder or hub id.")],
    data: Annotated[str, typer.Option(help="Evaluation data: file, folder or hub name.")],
    task: Annotated[str, typer.Option(help="lm or classify.")] = "lm",
    dense: Annotated[bool, typer.Option("--dense", help="Evaluate a dense baseline.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward; does not change the result.")] = 16,
    context_length: ContextLength = None,
    stride: Annotated[int | None, typer.Option(help="Step of the sliding window; default half the context.")] = None,
    prompt_column: PromptColumn = None,
    target_column: TargetColumn = None,
    text_column: TextColumn = None,
    text_pair_column: TextPairColumn = None,
    label_column: LabelColumn = None,
    messages_column: MessagesColumn = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest generated answer.")] = None,
    split: Split = None,
    limit: Limit = None,
    seed: Annotated[int, typer.Option()] = 0,
    json_file: JsonFile = None,
) -> None:
    """Quality, achieved sparsity and FLOPs of a model."""
    from lte import evaluate as module
    from lte.runs import trained_task
    from lte.tasks import TaskConfig, build_task

    given = {
        "context_length": context_length,
        "stride": stride,
        "prompt_column": prompt_column,
        "target_column": target_column,
        "text_column": text_column,
        "text_pair_column": text_pair_column,
        "label_column": label_column,
        "messages_column": messages_column,
        "max_new_tokens": max_new_tokens,
        "split": split,
        "limit": limit,
    }
    _check_json_target(json_file)
    flags = {key: value for key, value in given.items() if value is not None}
    built = build_task(TaskConfig(**{**trained_task(model, task), **flags}))
    loaded, tokenizer = module.load_for_evaluation(model, built, dense=dense)
    with _progress("evaluating") as progress:
        result = module.evaluate(
            loaded, tokenizer, built, data, dense=dense, batch_size=batch_size, seed=seed, progress=progress
        )
    result["model"] = model
    result["command"] = _command()
    _print_evaluation(result)
    _write_json(json_file, result)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Sparse model: folder or hub id.")],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
) -> None:
    """Continue a prompt with a sparse model."""
    from lte.generate import generate_text

    typer.echo(generate_text(model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed))


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Sparse model: folder or hub id.")], json_file: JsonFile = None
) -> None:
    """Experts, sparsity, FLOPs and parameters of a sparse model, layer by layer."""
    from lte.inspect import inspect_checkpoint

    result = inspect_checkpoint(model)
    _write_json(json_file, result)
    _print_inspection(result)


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for the result.")] = Path("out/quickstart"),
    overwrite: Overwrite = False,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train a small model on the Python standard library's text, make it sparse, compare. No network, minutes."""
    from lte.quickstart import quickstart as run

    run(out, overwrite=overwrite, seed=seed, console=console)


@bench_app.command("grouping")
def bench_grouping(json_file: JsonFile = None) -> None:
    """Time balanced k-means and compare its cost with k-means-constrained."""
    from lte.bench.grouping import bench_grouping as run

    rows = run()
    _write_json(json_file, {"rows": rows, "command": _command()})
    table = Table(*rows[0].keys())
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)


FFN_COLUMNS = {
    "tokens": "tokens",
    "sparsity": "sparsity",
    "backend": "backend",
    "dense_ms": "dense ms",
    "sparse_ms": "sparse ms",
    "speedup": "speed-up",
    "gbytes_per_s": "GB/s",
    "limit_gbytes_per_s": "limit GB/s",
    "share_of_limit": "share",
    "max_error": "error",
    "status": "status",
}
DECODE_COLUMNS = {
    "engine": "engine",
    "sparsity": "sparsity",
    "ms_per_token": "ms/token",
    "speedup": "x transformers",
    "speedup_over_compiled": "x compiled",
    "speedup_over_llama_cpp": "x llama.cpp",
    "limit_speedup": "limit x dense",
    "gbytes_per_s": "GB/s",
    "limit_gbytes_per_s": "limit GB/s",
    "max_error": "error",
    "status": "status",
}
LIMIT_COLUMNS = {
    "config": "model",
    "sparsity": "FFN sparsity",
    "gbytes_per_token": "dense GB/token",
    "sparse_gbytes_per_token": "sparse GB/token",
    "ffn_share": "FFN share",
    "router_share": "router share",
    "limit_speedup": "best speed-up",
    "limit_speedup_without_router": "without router",
}
Dtype = Annotated[str, typer.Option(help="fp32, bf16 or fp16.")]
Sparsities = Annotated[str, typer.Option("--sparsity", help="FFN sparsities, separated by commas.")]
ExpertSize = Annotated[int, typer.Option(help="Neurons per expert.")]
Threads = Annotated[int | None, typer.Option(help="Threads; torch's number by default.")]


@bench_app.command("ffn")
def bench_ffn(
    d_model: Annotated[int, typer.Option(help="Width of the residual stream.")] = 4096,
    d_ff: Annotated[int, typer.Option(help="Neurons.")] = 11008,
    dtype: Dtype = "bf16",
    sparsity: Sparsities = "0,0.5,0.75,0.9",
    tokens: Annotated[str, typer.Option(help="Tokens per call, separated by commas.")] = "1",
    expert_size: ExpertSize = 32,
    impl: Annotated[str, typer.Option(help="auto, reference, cpu or triton.")] = "auto",
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Time one FFN, dense against sparse, router included, and say how close it comes to the memory's limit."""
    from lte.bench.ffn import bench_ffn as run
    from lte.hub import default_device

    _set_threads(threads)
    device = default_device()
    with _status() as progress:
        rows, crossover = run(
            d_model=d_model,
            d_ff=d_ff,
            dtype=dtype,
            sparsities=_numbers(sparsity, "sparsity"),
            tokens=[int(n) for n in _numbers(tokens, "tokens")],
            expert_size=expert_size,
            impl=impl,
            device=device,
            progress=progress,
        )
    _print_rows(rows, FFN_COLUMNS, f"{d_model} x {d_ff}, {dtype}; dense: {rows[0]['baseline']}", json_file, crossover)


@bench_app.command("decode")
def bench_decode(
    config: Annotated[str, typer.Option(help="Shape with random weights; see `lte bench limit` for names.")] = "llama-1.2b",
    model: Annotated[str | None, typer.Option(help="A trained sparse model instead, at the sparsity it has.")] = None,
    dtype: Dtype = "bf16",
    sparsity: Sparsities = "0,0.5,0.8",
    batch: Annotated[int, typer.Option(help="Sequences decoded together.")] = 1,
    new_tokens: Annotated[int, typer.Option(help="Tokens per turn.")] = 32,
    rounds: Annotated[int, typer.Option(help="Turns per engine.")] = 3,
    expert_size: ExpertSize = 32,
    compile_: Annotated[bool, typer.Option("--compile/--no-compile", help="Also torch.compile (takes minutes).")] = True,
    llama_cpp: Annotated[bool, typer.Option("--llama-cpp/--no-llama-cpp", help="Also llama.cpp, if installed.")] = True,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Time `generate`: transformers, transformers compiled, lte at each sparsity, and llama.cpp, side by side."""
    from lte.bench.decode import bench_decode as run
    from lte.hub import default_device

    _set_threads(threads)
    with _status() as progress:
        rows, crossover = run(
            config_name=config,
            model_folder=model,
            dtype=dtype,
            sparsities=_numbers(sparsity, "sparsity"),
            batch=batch,
            new_tokens=new_tokens,
            rounds=rounds,
            expert_size=expert_size,
            compiled=compile_,
            with_llama_cpp=llama_cpp,
            device=default_device(),
            progress=progress,
        )
    _print_rows(rows, DECODE_COLUMNS, f"{model or config}, {dtype}, batch {batch}", json_file, crossover)


@bench_app.command("limit")
def bench_limit(
    config: Annotated[str | None, typer.Option(help="One shape; all known ones by default.")] = None,
    sparsity: Sparsities = "0.5,0.8,0.9",
    expert_size: ExpertSize = 32,
    context: Annotated[int, typer.Option(help="Tokens in the KV cache.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """Predict the best possible decode speed-up from the bytes a token needs: why the gain is bounded, and where."""
    from lte.bench.limit import bench_limit as run
    from lte.bench.shapes import SHAPES

    rows = run(
        [config] if config else list(SHAPES),
        _numbers(sparsity, "sparsity"),
        expert_size=expert_size,
        context=context,
    )
    _print_rows(rows, LIMIT_COLUMNS, f"batch 1, bf16, {expert_size} neurons per expert", json_file)


@bench_app.command("gpu")
def bench_gpu(
    json_file: JsonFile = None,
    quick: Annotated[bool, typer.Option(help="Correctness and one FFN shape only.")] = False,
) -> None:
    """Everything a GPU should answer, in under eight minutes: correctness first, then FFN and whole-model speed."""
    from lte.bench.gpu import bench_gpu as run

    with _status() as progress:
        result = run(quick=quick, progress=progress)
    _write_json(json_file, {"command": _command(), **result})
    _print_table(result["correctness"], {"case": "case", "max_error": "error", "tolerance": "tolerance", "status": "status"})
    _print_table(result["ffn"], {"dtype": "dtype", **FFN_COLUMNS}, "LLaMA-2-7B FFN, CUDA graph")
    _print_table(result["decode"], {"tokens": "batch", **DECODE_COLUMNS}, "whole model, CUDA graph")


def main() -> None:
    """Entry point: a user's error is one line on stderr and exit code 2."""
    try:
        app()
    except LTEError as error:
        typer.echo("error: " + " ".join(str(error).split()), err=True)
        sys.exit(2)


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        if threads < 1:
            raise ConfigError(f"threads={threads} is out of range; it is at least 1")
        import torch

        torch.set_num_threads(threads)


def _numbers(text: str, name: str) -> list[float]:
    """``0,0.5`` -> [0.0, 0.5]."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--{name} {text!r} is no list of numbers; write it like 0,0.5,0.8") from None


@contextmanager
def _status() -> Iterator[Callable[[str], None]]:
    """A line that says what is going on; lasting lines where the output is no terminal."""
    if not console.is_terminal:
        yield lambda line: typer.echo(line, err=True)
        return
    with console.status("") as status:
        yield status.update


def _print_rows(
    rows: list[dict[str, Any]], columns: dict[str, str], title: str, json_file: Path | None, crossover: Any = None
) -> None:
    """Table, what was measured about the crossover, and the JSON."""
    from lte.bench.rows import report
    from lte.hub import default_device

    _print_table(rows, columns, title)
    if crossover is not None:
        console.print(crossover.describe())
    more = {} if crossover is None else {"crossover": crossover.describe()}
    _write_json(json_file, report(rows, _command(), default_device(), **more))


def _print_table(rows: list[dict[str, Any]], columns: dict[str, str], title: str = "") -> None:
    from lte.bench.rows import table

    console.print(table(rows, columns, title))


@contextmanager
def _resumable(out: str) -> Iterator[None]:
    """Say how to go on after Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"interrupted; the same command with --resume goes on from the last checkpoint in {out}", err=True)
        raise typer.Exit(130) from None


def _common_flags(values: dict[str, Any]) -> dict[str, Any]:
    """Flags that training and fine-tuning share -> recipe keys."""
    return {
        "model": values["model"],
        "data": values["data"],
        "out": values["out"],
        "seed": values["seed"],
        "task.name": values["task"],
        "task.context_length": values["context_length"],
        "task.prompt_column": values["prompt_column"],
        "task.target_column": values["target_column"],
        "task.text_column": values["text_column"],
        "task.label_column": values["label_column"],
        "task.text_pair_column": values["text_pair_column"],
        "task.messages_column": values["messages_column"],
        "task.split": values["split"],
        "task.limit": values["limit"],
        "training.learning_rate": values["learning_rate"],
        "training.per_device_train_batch_size": values["batch_size"],
    }


def _command() -> str:
    import shlex

    return shlex.join(["lte", *sys.argv[1:]])


def _check_json_target(path: Path | None) -> None:
    if path is not None and path.is_dir():
        raise ConfigError(f"--json {str(path)!r} is a folder; name a file")


def _write_json(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")


class _progress:
    """A rich progress bar with the time left, as the callback evaluation takes."""

    def __init__(self, description: str) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn(description),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self.task = self.bar.add_task(description, total=None)

    def __enter__(self) -> _progress:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def __call__(self, done: int, total: int) -> None:
        self.bar.update(self.task, completed=done, total=total)


def _print_evaluation(result: dict[str, Any]) -> None:
    table = Table(title=result["model"], show_header=False)
    table.add_row(result["metric"], f"{result['value']:.4f}")
    for name, value in result["extras"].items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    flops = result["gflops_per_token"]
    table.add_row("FFN sparsity", f"{result['sparsity']:.1%}")
    table.add_row("per layer", " ".join(f"{share:.0%}" for share in result["sparsity_per_layer"]))
    table.add_row(
        "GFLOPs/token",
        f"dense {flops['dense']:.4g}, sparse {flops['sparse']:.4g}, router {flops['router']:.2g}",
    )
    table.add_row("tokens", f"{result['tokens']:,}")
    console.print(table)


def _print_inspection(result: dict[str, Any]) -> None:
    config = result["config"]
    settings = ", ".join(
        f"{key}={value}" for key, value in config.items() if key not in ("quant_method", "lte_version")
    )
    console.print(f"[bold]{result['model']}[/] {result['architecture']}: {settings}")
    table = Table("layer", "experts", "sparsity", "MFLOPs dense", "sparse", "router", "FFN weights", "router weights")
    for index, layer in enumerate(result["layers"]):
        flops = layer["mflops"]
        known = layer["sparsity"] is not None
        table.add_row(
            str(index),
            f"{layer['experts']} x {layer['expert_size']}",
            f"{layer['sparsity']:.1%}" if known else "unknown",
            f"{flops['dense']:.3f}",
            f"{flops['sparse']:.3f}" if known else "-",
            f"{flops['router']:.3f}",
            f"{layer['parameters']['ffn']:,}",
            f"{layer['parameters']['router']:,}",
        )
    console.print(table)
    total = result["gflops_per_token"]
    sparse = "-" if total["sparse"] is None else f"{total['sparse']:.4g}"
    console.print(
        f"GFLOPs/token: dense {total['dense']:.4g}, sparse {sparse}, router {total['router']:.2g}; "
        f"parameters {result['parameters']['total']:,}"
    )
