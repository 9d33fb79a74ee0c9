"""``lte evaluate`` and ``lte calibrate``. Parse, call, print."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from lte.errors import ConfigError, check_seed
from lte.options import (
    ContextLength,
    LabelColumn,
    Limit,
    MessagesColumn,
    PromptColumn,
    Split,
    TargetColumn,
    TextColumn,
    TextPairColumn,
    TrainedTask,
    task_as_trained,
)
from lte.terminal import JsonFile, ProgressBar, console, numbers, write_json


def evaluate(
    model: Annotated[str, typer.Argument(help="Sparse model: folder or hub id; with --dense also a .gguf file.")],
    data: Annotated[str | None, typer.Option(help="Evaluation data: file, folder or hub name.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Instead: standard tasks of lm-evaluation-harness, with commas, or task files.")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples in a prompt of --tasks.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of more task files, which win.")] = None,
    task: TrainedTask = None,
    dense: Annotated[bool, typer.Option("--dense", help="Evaluate a dense baseline.")] = False,
    sparsity: Annotated[
        float | None, typer.Option(help="Run at this sparsity, from the points `lte calibrate` left.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="A dense model to show beside it, e.g. of `lte finetune` on the same data.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Also KL divergence to this model, and the share of tokens with the same top.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward; does not change the result.")] = 16,
    context_length: ContextLength = None,
    stride: Annotated[int | None, typer.Option(help="Step of the sliding window; default half the context.")] = None,
    prompt_column: PromptColumn = None,
    target_column: TargetColumn = None,
    text_column: TextColumn = None,
    text_pair_column: TextPairColumn = None,
    label_column: LabelColumn = None,
    messages_column: MessagesColumn = None,
    metric: Annotated[
        str | None, typer.Option(help="The main number, of `lte tasks`; the others are beside it.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest generated answer.")] = None,
    split: Split = None,
    limit: Limit = None,
    seed: Annotated[int, typer.Option()] = 0,
    json_file: JsonFile = None,
) -> None:
    """Quality, achieved sparsity and FLOPs of a model."""
    from lte.hub import read_config

    for flag, value in {"sparsity": sparsity, "baseline": baseline}.items():
        if dense and value is not None:
            raise ConfigError(f"--{flag} {value} goes with a sparse model; leave out --dense")
    check_seed(seed)
    _check_flags(locals())
    for other in filter(None, (baseline, against)):
        read_config(other)
    if tasks is not None:
        measure = _harness(
            tasks,
            include_path,
            batch_size=batch_size,
            max_length=context_length,
            num_fewshot=num_fewshot,
            limit=limit,
            seed=seed,
        )
    else:
        measure = partial(
            _evaluate,
            task=task_as_trained(locals()),
            data=str(data),
            batch_size=batch_size,
            seed=seed,
            against=against,
        )
    result = measure(model, title="evaluating", dense=dense, sparsity=sparsity)
    if baseline is not None:
        result["baseline"] = measure(baseline, title="the dense baseline", dense=True)
    _print_evaluation(result)
    write_json(json_file, result)


_FOR_TASKS: tuple[str, ...] = ("num_fewshot", "include_path")
_FOR_DATA: tuple[str, ...] = (
    "task",
    "stride",
    "prompt_column",
    "target_column",
    "text_column",
    "text_pair_column",
    "label_column",
    "messages_column",
    "metric",
    "max_new_tokens",
    "split",
    "against",
)


def _check_flags(values: dict[str, Any]) -> None:
    """ConfigError for flags that contradict each other."""
    if (values["data"] is None) == (values["tasks"] is None):
        what = "neither was given" if values["data"] is None else "both were given"
        raise ConfigError(f"evaluate takes --data FILE or --tasks NAMES, one of the two; {what}")
    given, others = ("tasks", _FOR_DATA) if values["tasks"] is not None else ("data", _FOR_TASKS)
    for name in others:
        if values[name] is not None:
            raise ConfigError(f"--{name.replace('_', '-')} {values[name]} does not go with --{given}; leave it out")


def calibrate(
    model: Annotated[Path, typer.Argument(help="Folder of a sparse model.")],
    data: Annotated[str, typer.Option(help="Text to reach the sparsity on: file, folder or hub name.")],
    target_sparsity: Annotated[
        str, typer.Option(help="One sparsity, or several with commas: the model is left at the last.")
    ],
    task: TrainedTask = None,
    per_layer: Annotated[
        bool | None, typer.Option("--per-layer/--one-threshold", help="The same sparsity in every layer, or in all.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of the data to use; default 16384.")] = None,
    context_length: ContextLength = None,
    prompt_column: PromptColumn = None,
    target_column: TargetColumn = None,
    text_column: TextColumn = None,
    text_pair_column: TextPairColumn = None,
    label_column: LabelColumn = None,
    messages_column: MessagesColumn = None,
    split: Split = None,
    limit: Limit = None,
    json_file: JsonFile = None,
) -> None:
    """Move a trained model's thresholds to another sparsity, and save them as operating points."""
    from lte.runs import calibrate_checkpoint
    from lte.thresholds import DIAL_TOKENS

    sparsities = numbers(target_sparsity, "target-sparsity")
    built = task_as_trained(locals())
    with ProgressBar("calibrating") as progress:
        points = calibrate_checkpoint(
            model, data, built, sparsities, per_layer=per_layer, tokens=tokens or DIAL_TOKENS, progress=progress
        )
    table = Table("asked for", "reached", "thresholds", title=str(model))
    for asked, point in zip(sparsities, points, strict=True):
        shown = sorted(set(point.thresholds)) if len(set(point.thresholds)) == 1 else point.thresholds
        table.add_row(f"{asked:.1%}", f"{point.sparsity:.1%}", " ".join(f"{value:.4g}" for value in shown))
    console.print(table)
    console.print("The model now runs at the last. At run time: model.set_sparsity(0.6), anywhere between the points.")
    write_json(
        json_file,
        {"model": str(model), "points": [point.model_dump(mode="json") for point in points]},
    )


def _evaluate(
    path: str,
    *,
    task: Any,
    data: str,
    title: str,
    dense: bool,
    sparsity: float | None = None,
    against: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    from lte import evaluate as module
    from lte.thresholds import set_sparsity, sparsity_set_for

    model, tokenizer = module.load_for_evaluation(path, task, dense=dense)
    if sparsity is not None:
        set_sparsity(model, sparsity)
    expected = sparsity_set_for(model) if sparsity is None and not dense else sparsity
    other = None if against is None else module.load_to_compare(against)
    with ProgressBar(title) as progress:
        result = module.evaluate(
            model, tokenizer, task, data, dense=dense, against=other, progress=progress, **settings
        )
    named = {} if against is None else {"against": against}
    return {**result, **named, "model": path} | ({} if expected is None else {"expected_sparsity": expected})


def _harness(
    names: str, include_path: Path | None, *, batch_size: int, max_length: int | None, **settings: Any
) -> Callable[..., dict[str, Any]]:
    """What evaluates a model on standard tasks; a wrong name is found before any model is loaded."""
    from lte.lm_eval import LTEModel, TaskSet, evaluate_tasks

    tasks = TaskSet(names.split(","), include_path)

    def measure(path: str, *, title: str, dense: bool, sparsity: float | None = None) -> dict[str, Any]:
        # Data that cannot be had is found before a model is loaded, too.
        loaded = tasks.load()
        with ProgressBar(title) as progress:
            model = LTEModel(
                path, dense=dense, sparsity=sparsity, batch_size=batch_size, max_length=max_length, progress=progress
            )
            return evaluate_tasks(model, tasks, loaded=loaded, **settings)

    return measure


def _print_evaluation(result: dict[str, Any]) -> None:
    from lte.thresholds import MISSED

    shown = [result, *([result["baseline"]] if "baseline" in result else [])]
    title = None if len(shown) > 1 else result["model"]
    table = Table("", *(each["model"] for each in shown), show_header=title is None, title=title)
    table.add_row(result["metric"], *(_with_error(each, result["metric"], each["value"]) for each in shown))
    for name in result["extras"]:
        table.add_row(name, *(_with_error(each, name, each["extras"][name]) for each in shown))
    if "harness" in result:
        names = [name for name in result["harness"]["results"] if name in result["harness"].get("n-samples", {})]
        table.add_row("rows", f"{sum(result['harness']['n-samples'][name]['effective'] for name in names):,}")
    table.add_row("FFN sparsity", *(f"{each['sparsity']:.1%}" for each in shown))
    table.add_row("per layer", *(" ".join(f"{share:.0%}" for share in each["sparsity_per_layer"]) for each in shown))
    flops = [each["gflops_per_token"] for each in shown]
    table.add_row("GFLOPs/token", *(f"{each['sparse']:.4g}" for each in flops))
    table.add_row("of these router", *(f"{each['router']:.2g}" for each in flops))
    table.add_row("dense", *(f"{each['dense']:.4g}" for each in flops))
    read = [each["bytes_per_token"] for each in shown]
    table.add_row("MB/token", *(f"{each['sparse'] / 1e6:.4g}" for each in read))
    table.add_row("dense", *(f"{each['dense'] / 1e6:.4g}" for each in read))
    table.add_row("tokens", *(f"{each['tokens']:,}" for each in shown))
    console.print(table)
    expected = result.get("expected_sparsity", result["sparsity"])
    if abs(result["sparsity"] - expected) > MISSED:
        console.print(
            f"The thresholds give {expected:.1%} on the text they were found on, and {result['sparsity']:.1%} here. "
            f"To have {expected:.0%} on such text: lte calibrate {result['model']} --data OTHER_SUCH_TEXT "
            f"--target-sparsity {expected:.2g}"
        )


def _with_error(result: dict[str, Any], name: str, value: Any) -> str:
    """A number of a result as it is shown, with its standard error where the harness gives one."""
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    harness = result.get("harness", {"tasks": [], "results": {}})
    task, _, metric = name.rpartition(" ")
    if not task and len(harness["tasks"]) == 1:
        task = harness["tasks"][0]
    error = harness["results"].get(task, {}).get(f"{metric}_stderr,none")
    return f"{text} ± {error:.4f}" if isinstance(error, float) else text
