"""``lte sweep`` and ``lte compare``. Parse, call, print."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from lte.options import (
    BatchSize,
    ContextLength,
    LabelColumn,
    LearningRate,
    Limit,
    MessagesColumn,
    PromptColumn,
    Set,
    Split,
    TargetColumn,
    TextColumn,
    TextPairColumn,
    common_flags,
)
from lte.terminal import console, numbers, stoppable


def _going_on() -> AbstractContextManager[None]:
    return stoppable(lambda stopped: "the same command goes on with the points that are missing")


def sweep(
    study: Annotated[Path, typer.Argument(help="YAML study: a recipe and grids of settings.")],
    only: Annotated[str, typer.Option(help="Shell pattern of the points to run.")] = "*",
    part: Annotated[str, typer.Option(help="i/n: every n-th point, to share a study between n processes.")] = "1/1",
) -> None:
    """Train and evaluate every point of a study that has no result yet; one JSON each."""
    from lte import study as module

    with _going_on():
        loaded = module.load_study(study)
        module.check_data(loaded)
        done = module.run_study(loaded, only=only, part=part, report=console.print)
    console.print(f"{done} points run" if done else "nothing to run: every point has its result")


def compare(
    model: Annotated[str, typer.Option(help="Dense model: folder, hub id or .gguf file.")],
    task: Annotated[str, typer.Option(help="lm (text, prompt -> target, chat), classify, or of `lte tasks`.")],
    data: Annotated[str, typer.Option(help="Training data: file, folder or hub name.")],
    out: Annotated[Path, typer.Option(help="Folder for the points, the report and the models.")],
    methods: Annotated[
        str, typer.Option(help="Of `lte methods`, with commas: METHOD, METHOD:trained, METHOD:untrained, NAME=METHOD.")
    ],
    sparsities: Annotated[str, typer.Option(help="Targets, comma-separated, e.g. 0.5,0.8.")],
    steps: Annotated[int, typer.Option(help="Training steps of the dense model and of methods that train.")] = 0,
    dense_steps: Annotated[
        int, typer.Option(help="Of --steps, the first so many with the dense model, once for all.")
    ] = 0,
    seeds: Annotated[int, typer.Option(help="Runs of every point.")] = 1,
    eval_data: Annotated[str | None, typer.Option(help="Default: every tenth row of --data, held out.")] = None,
    decode_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens generated, in bfloat16, to be timed; 0 for no timing.")
    ] = 32,
    tasks: Annotated[
        str, typer.Option(help="Also of lm-evaluation-harness, e.g. lambada_openai:limit=200,mmlu:num_fewshot=5.")
    ] = "",
    include_path: Annotated[Path | None, typer.Option(help="Folder of more task files for --tasks.")] = None,
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
    settings: Set = [],  # noqa: B006
) -> None:
    """Hold methods against each other: same model, data, steps; run again, it goes on where it was interrupted."""
    from lte import compare as module
    from lte.config import METHODS
    from lte.recipe import parse_setting, put

    own = [(*key.partition(".")[::2], value) for key, value in map(parse_setting, settings)]
    named = [name.strip() for name in methods.split(",") if name.strip()]
    labels = {name.partition("=")[0] for name in named} | METHODS.keys()
    of_methods = [each for each in own if each[0] in labels]
    base: dict[str, Any] = {}
    common = {**common_flags({**locals(), "out": None, "seed": None}), "training.save_strategy": "no"}
    for key, value in common.items():
        if value is not None:
            put(base, key, value)
    for section, key, value in own:
        if (section, key, value) not in of_methods:
            put(base, f"{section}.{key}" if key else section, value)
    prepare = None
    if eval_data is None:
        base["data"], eval_data = map(str, module.held_out(out))
        base["task"].pop("split", None)
        prepare = partial(module.hold_out, data, split, out)
    with _going_on():
        study = module.design(
            base,
            methods=named,
            sparsities=numbers(sparsities, "sparsities"),
            steps=steps,
            dense_steps=dense_steps,
            seeds=seeds,
            eval_data=eval_data,
            out=out,
            settings=of_methods,
            decode_tokens=decode_tokens,
            tasks=[name for name in tasks.split(",") if name.strip()],
            include_path=include_path,
        )
        page = module.compare(study, out, report=console.print, prepare=prepare)
    console.print((out / "table.md").read_text())
    console.print(f"{page}; every point is in {out / 'points.csv'}")
