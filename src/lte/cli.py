"""The ``lte`` command: parse, call, print."""

# Commands import what they need themselves: datasets and matplotlib take seconds to load.

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import traceback
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.table import Column, Table
from transformers.utils import logging as transformers_logging

from lte.bench_commands import bench_app
from lte.errors import ConfigError, LTEError
from lte.evaluate_commands import calibrate, evaluate
from lte.files import is_full_disk
from lte.memory import is_shortage
from lte.options import (
    BatchSize,
    ContextLength,
    Data,
    LabelColumn,
    LearningRate,
    Limit,
    MessagesColumn,
    Model,
    Out,
    Overwrite,
    PromptColumn,
    RecipeFile,
    Resume,
    Seed,
    Set,
    Split,
    TargetColumn,
    TaskName,
    TextColumn,
    TextPairColumn,
    common_flags,
)
from lte.quantize_commands import quantize
from lte.study_commands import compare, sweep
from lte.terminal import JsonFile, command_line, console, stoppable, write_json

if TYPE_CHECKING:
    from lte.training import Terminated

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_app, name="bench")


@app.callback()
def lte(
    plugin: Annotated[
        list[str], typer.Option(envvar="LTE_PLUGIN", help="Python file or module to import first: your own methods.")
    ] = [],  # noqa: B006
) -> None:
    """Turn a dense Hugging Face transformer into a contextually sparse one, and run it."""
    for name in plugin:
        _import_plugin(name)
    # Progress is shown by the commands, not by each library on its own.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.disable_progress_bar()


def _import_plugin(name: str) -> None:
    """Import a file or a module; ConfigError where that fails."""
    try:
        if not name.endswith(".py"):
            importlib.import_module(name)
        elif (stem := Path(name).stem) not in sys.modules:
            spec = importlib.util.spec_from_file_location(stem, name)
            assert spec is not None
            assert spec.loader is not None
            sys.modules[stem] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"--plugin {name} cannot be imported: {type(error).__name__}: {error}") from error


OFF_TARGET = 3
"""Exit code of a training that ended, but not at the sparsity asked for."""


@app.command()
def methods(json_file: JsonFile = None) -> None:
    """List what can make a model sparse."""
    from lte.config import METHODS

    keys = ("method", "decides", "trained", "ffns", "kernels", "sparsity", "neurons")
    rows = []
    for name, (settings, method) in sorted(METHODS.items()):
        trained = "yes" if method.trains else "may be" if method.trainable else "no"
        rows.append([name, method.decides, trained, method.families, method(settings()).kernels, settings.sparsity_is])
        rows[-1].append(str(settings.model_fields["expert_size"].default))
    shown = keys[: 5 if console.width < 105 else 7]  # or words would be broken
    table = Table(Column("method", no_wrap=True), *(Column(key, overflow="fold") for key in shown[1:]), box=None)
    for row in rows:
        table.add_row(*row[: len(shown)])
    console.print(table)
    console.print(
        "trained: whether the model is, as published; sparsity: what gives it; neurons: switched together by default "
        "(both where there is room, and with --json). Settings: --set sparsity.method=NAME, --set sparsity.KEY=VALUE."
    )
    write_json(json_file, {"methods": [dict(zip(keys, row, strict=True)) for row in rows]})


@app.command()
def tasks(json_file: JsonFile = None) -> None:
    """List what models are trained and measured on."""
    from lte.tasks import PRESETS

    folded = (Column(name, overflow="fold") for name in ("what", "metric", "settings"))
    table = Table(Column("task", no_wrap=True), *folded, box=None)
    rows = [
        ["lm", "text, prompt -> target, or chats", "perplexity, rougeL, bleu", ""],
        ["classify", "a text, or two", "accuracy, f1, matthews, pearson, spearman", ""],
    ]
    for name, preset in PRESETS.items():
        settings = " ".join(f"{key}={value}" for key, value in preset.settings.items())
        rows.append([name, preset.about, preset.metric, f"{preset.kind}: {settings}"])
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(
        "--task NAME --data FILE trains and evaluates. Whatever else lm-evaluation-harness has, LAMBADA and MMLU among "
        "it: lte evaluate OUT --tasks NAMES, from local files with --include-path FOLDER (docs/evaluation.md)."
    )
    write_json(
        json_file, {"tasks": [dict(zip(("task", "about", "metric", "settings"), row, strict=True)) for row in rows]}
    )


@app.command()
def train(
    recipe: RecipeFile = None,
    model: Model = None,
    task: TaskName = None,
    data: Data = None,
    out: Out = None,
    target_sparsity: Annotated[
        float | None, typer.Option(help="Share of FFN neurons not to be used, e.g. 0.7; training finds the way.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", metavar="NAME", help="single-stage, or paper: the published two stages.")
    ] = None,
    eta: Annotated[
        float | None, typer.Option(help="Instead of a target: weight of the efficiency loss, larger is sparser.")
    ] = None,
    expert_size: Annotated[int | None, typer.Option(help="Neurons per expert.")] = None,
    grouping: Annotated[str | None, typer.Option(help="predicted, coactivation, kmeans, ...")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data (single-stage).")] = None,
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
    """Make a dense model sparse and train it to a target sparsity."""
    from lte import runs
    from lte.recipe import load_recipe

    flags = {
        **common_flags(locals()),
        "preset": preset,
        "training.target_sparsity": target_sparsity,
        "training.eta": eta,
        "training.num_train_epochs": epochs,
        "training.stage1_epochs": stage1_epochs,
        "training.stage2_epochs": stage2_epochs,
        "sparsity.expert_size": expert_size,
        "sparsity.grouping": grouping,
    }
    loaded = load_recipe(recipe, flags, settings)
    with _resumable(loaded.out):
        summary = runs.train(loaded, resume=resume, overwrite=overwrite)
    sparsity = f", FFN sparsity {summary['sparsity']:.1%} on training text" if "sparsity" in summary else ""
    console.print(_cost(summary))
    console.print(
        f"[bold]{loaded.out}[/]: {summary['steps']} steps in {summary['seconds']:.0f} s{sparsity}. "
        f"Next: lte evaluate {loaded.out} --data FILE"
    )
    loss = summary.get("task_loss", {})
    if loss.get("last") and loss["last"] > 1.05 * loss["first"]:
        console.print(
            f"task loss {loss['first']:.2f} in the first step, {loss['last']:.2f} in the last ones: the model has lost "
            "more to the target than training gave back. Train it longer, with a lower target, or a slower warm-up "
            "(--set training.target_warmup=0.5)"
        )
    if strays := summary.get("steps_out_of_band"):
        console.print(f"{strays} of {summary['steps']} steps were not at the sparsity wanted of them, see the warnings")
    if summary.get("on_target") is False:
        trained = summary["trained_sparsity"]
        at = "no step says at what" if trained is None else f"at {trained:.1%}"
        typer.echo(
            f"off target: the model was trained {at}, not {loaded.training['target_sparsity']:.1%}. It is saved, with "
            "thresholds for the target, but train it for longer or with a lower learning rate",
            err=True,
        )
        raise typer.Exit(OFF_TARGET)


@app.command()
def sparsify(
    recipe: RecipeFile = None,
    model: Model = None,
    task: TaskName = None,
    data: Data = None,
    out: Out = None,
    target_sparsity: Annotated[float | None, typer.Option(help="Share of FFN neurons not to be used.")] = None,
    expert_size: Annotated[int | None, typer.Option(help="Neurons per expert.")] = None,
    grouping: Annotated[str | None, typer.Option(help="predicted, coactivation, kmeans, ...")] = None,
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
    overwrite: Overwrite = False,
) -> None:
    """Make a dense model sparse without training: routers fitted to some data. Cheap; costs quality soon."""
    from lte import runs
    from lte.recipe import load_recipe

    flags = {
        **common_flags({**locals(), "learning_rate": None, "batch_size": None}),
        "training.target_sparsity": target_sparsity,
        "sparsity.expert_size": expert_size,
        "sparsity.grouping": grouping,
    }
    loaded = load_recipe(recipe, flags, settings)
    summary = runs.make_sparse(loaded, overwrite=overwrite)
    console.print(_cost(summary))
    console.print(
        f"[bold]{loaded.out}[/]: FFN sparsity {summary['sparsity']:.1%} on the data. "
        f"Next: lte evaluate {loaded.out} --data FILE"
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

    flags = {**common_flags(locals()), "training.num_train_epochs": epochs}
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

    model, tokenizer = create(config, data, out, vocab_size=vocab_size, seed=seed)
    console.print(f"[bold]{out}[/]: {model.num_parameters():,} parameters, {len(tokenizer)} tokens")


app.command()(evaluate)
app.command()(calibrate)
app.command()(quantize)
app.command()(sweep)
app.command()(compare)


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
    write_json(json_file, result)
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


def main() -> None:
    """Entry point: whatever goes wrong is one line on stderr.

    Exit code 2 for what a user can mend, 1 for anything else, whose traceback is left in a file; ``--debug``, anywhere
    on the line, lets the traceback through.
    """
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    command = typer.main.get_command(app)
    try:
        # Not as typer does it, which answers mistakes in a box of several lines and Ctrl-C without a word.
        with command.make_context("lte", sys.argv[1:]) as context:
            command.invoke(context)
    except typer.Exit as ended:
        sys.exit(ended.exit_code)
    except typer.Abort:
        sys.exit(1)
    except BrokenPipeError:  # of `lte methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except LTEError as error:
        if debug:
            raise
        _fail(2, str(error))
    except OSError as error:
        if debug:
            raise
        if is_full_disk(error):
            _fail(2, FULL_DISK + (f": {error.filename}" if error.filename else ""))
        _fail(2, f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
    except Exception as error:
        if hasattr(error, "format_message"):  # one of typer's own
            _fail_usage(error)
        if debug:
            raise
        if is_full_disk(error):
            _fail(2, FULL_DISK)
        if is_shortage(error):
            _fail(1, "out of memory; try a smaller batch or context, or another dtype")
        said = " ".join(str(error).split())
        said = said if len(said) < 300 else said[:300] + "..."
        _fail(1, f"{type(error).__name__}: {said}; the traceback is in {_leave_traceback(error)}, --debug shows it")


FULL_DISK = (
    "there is no space left to write to; what was complete stays as it is. Make room, then run the same command again, "
    "a training with --resume"
)


def _fail(code: int, message: str) -> NoReturn:
    line = "error: " + " ".join(message.split())
    typer.echo(line.encode("utf-8", "backslashreplace").decode(), err=True)
    sys.exit(code)


def _fail_usage(error: Any) -> NoReturn:
    """A mistake in the line itself; where there is nothing on it, the help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        sys.exit(2)
    context = getattr(error, "ctx", None)
    see = "" if context is None else f"; see {context.command_path} --help"
    _fail(2, error.format_message().rstrip(".") + see)


def _leave_traceback(error: BaseException) -> str:
    """The path of a file with the traceback and the command."""
    try:
        handle, path = tempfile.mkstemp(prefix="lte-error-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(command_line() + "\n\n" + "".join(traceback.format_exception(error)))
    except OSError as other:
        return f"no file ({other})"
    return path


def _resumable(out: str) -> AbstractContextManager[None]:
    from lte.training import last_complete_checkpoint

    def how(stopped: Terminated | None) -> str:
        if stopped is None:
            return f"the same command with --resume goes on from the last checkpoint in {out}"
        checkpoint = stopped.checkpoint or last_complete_checkpoint(Path(out) / "checkpoints")
        if checkpoint is None:
            return "nothing was trained yet: run the same command again"
        return f"a checkpoint is in {checkpoint}: the same command with --resume goes on from it"

    return stoppable(how)


def _cost(summary: dict[str, Any]) -> str:
    """Where a run's time went, and its peak memory."""
    parts = [f"{part} {seconds:.0f} s" for part, seconds in summary.get("seconds_of", {}).items()]
    peaks = [f"{gb:.1f} GB ({where})" for where, gb in summary.get("peak_memory_gb", {}).items()]
    return "; ".join(filter(None, (", ".join(parts), "peak memory " + ", ".join(peaks) if peaks else "")))


def _print_inspection(result: dict[str, Any]) -> None:
    config = result["config"]
    hidden = ("quant_method", "lte_version", "operating_points")
    thresholds = dict.fromkeys(layer["threshold"] for layer in result["layers"] if layer["threshold"] is not None)
    if thresholds:
        config = config | {"threshold": " ".join(f"{value:.4g}" for value in thresholds)}
    settings = ", ".join(f"{key}={value}" for key, value in config.items() if key not in hidden)
    console.print(f"[bold]{result['model']}[/] {result['architecture']}: {settings}")
    if points := config.get("operating_points"):
        console.print("operating points: " + ", ".join(f"{point['sparsity']:.1%}" for point in points))
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
    read = {name: "-" if size is None else f"{size / 1e6:.4g}" for name, size in result["bytes_per_token"].items()}
    console.print(
        f"GFLOPs/token: dense {total['dense']:.4g}, sparse {sparse}, router {total['router']:.2g}; MB/token: dense "
        f"{read['dense']}, sparse {read['sparse']}, router {read['router']}; "
        f"parameters {result['parameters']['total']:,}"
    )
