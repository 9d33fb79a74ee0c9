"""``lte quantize``. Parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lte.options import (
    ContextLength,
    Limit,
    MessagesColumn,
    PromptColumn,
    Split,
    TargetColumn,
    TextColumn,
    TrainedTask,
    bits_of,
    task_as_trained,
)
from lte.terminal import ProgressBar, console


def quantize(
    model: Annotated[str, typer.Argument(help="Sparse or dense model: folder, hub id or .gguf file.")],
    weights: Annotated[str, typer.Option(help="int8, int4, or any from int1 to int8.")],
    out: Annotated[Path, typer.Option(help="New folder for the result.")],
    data: Annotated[
        str | None, typer.Option(help="Text by which weights are rounded: file, folder or hub name; best given.")
    ] = None,
    group: Annotated[
        int | None,
        typer.Option(help="Weights that share a scale; default 32, or 64 for single neurons."),
    ] = None,
    head: Annotated[str | None, typer.Option(help="Of head and embeddings; default as --weights.")] = None,
    coarse: Annotated[
        int | None,
        typer.Option(help="Upper bits, read of all single neurons; 4, or 3 of 4 with --bits-per-token."),
    ] = None,
    bits_per_token: Annotated[
        float | None,
        typer.Option(help="Bits of an FFN weight a token reads in the mean: neurons are left out, coarse or exact."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of the data to use; default 16384.")] = None,
    steps: Annotated[
        int, typer.Option(min=0, help="Then train the scales to predict what the model of before does; 40 to 120.")
    ] = 0,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of these steps; default 5e-3 for 4 bits, half for each more.")
    ] = None,
    task: TrainedTask = None,
    context_length: ContextLength = None,
    prompt_column: PromptColumn = None,
    target_column: TargetColumn = None,
    text_column: TextColumn = None,
    messages_column: MessagesColumn = None,
    split: Split = None,
    limit: Limit = None,
) -> None:
    """Round a model's weights to a few bits: FFNs, attention, head and embeddings."""
    from lte.planes import weights_config
    from lte.quantize_run import quantize_checkpoint
    from lte.thresholds import DIAL_TOKENS

    wanted: dict[str, Any] = {
        "bits": bits_of(weights),
        "group": group,
        "head_bits": None if head is None else bits_of(head),
        "coarse": coarse,
        "bits_per_token": bits_per_token,
    }
    by_neuron = coarse is not None or bits_per_token is not None
    weights_config(by_neuron=by_neuron, **{key: value for key, value in wanted.items() if key != "bits_per_token"})
    built = task_as_trained(locals())
    with ProgressBar("rounding") as progress:
        summary = quantize_checkpoint(
            *(model, out, wanted),
            data=data,
            task=built,
            tokens=tokens or DIAL_TOKENS,
            steps=steps,
            learning_rate=learning_rate,
            progress=progress,
        )
    before, after = (summary["bytes_per_token"][key] / 1e6 for key in ("before", "after"))
    console.print(
        f"[bold]{out}[/]: {after:.1f} MB of weights for a token, {before:.1f} before, in {summary['seconds']:.0f} s. "
        f"Next: lte evaluate {out} --data FILE"
    )
