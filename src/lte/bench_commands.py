"""``lte bench``: the commands that measure speed. Parse, call, print."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lte.errors import ConfigError
from lte.terminal import JsonFile, command_line, console, numbers, whole_numbers, write_json

bench_app = typer.Typer(help="Measure speed.", no_args_is_help=True)

FFN_COLUMNS = {
    "tokens": "tokens",
    "sparsity": "sparsity",
    "backend": "backend",
    "dense_ms": "dense ms",
    "sparse_ms": "sparse ms",
    "speedup": "speed-up",
    "gbytes_per_s": "GB/s",
    "limit_gbytes_per_s": "limit",
    "max_error": "error",
    "status": "status",
}
DECODE_COLUMNS = {
    "engine": "engine",
    "weights": "weights",
    "sparsity": "sparsity",
    "ms_per_token": "ms/token",
    "speedup": "vs eager",
    "speedup_over_compiled": "vs compiled",
    "speedup_over_llama_cpp": "vs llama.cpp",
    "gbytes_per_s": "GB/s",
    "limit_gbytes_per_s": "limit",
    "max_error": "error",
    "status": "status",
}
PREFILL_COLUMNS = {
    "tokens": "tokens",
    "engine": "engine",
    "sparsity": "sparsity",
    "ms": "ms",
    "speedup": "vs stock",
    "speedup_over_llama_cpp": "vs llama.cpp",
    "backend": "backend",
    "max_error": "error",
    "status": "status",
}
FRONT_COLUMNS = {
    "engine": "engine",
    "weights": "weights",
    "steps": "steps",
    "bits_per_weight": "bits",
    "mbytes": "MB/token",
    "above_dense": "nats above",
    "kl_divergence": "KL",
    "same_top": "same top",
    "ms_per_token": "ms/token",
    "status": "status",
}
OURS = "int8,int6,int5,int4,int4@3.5,int4@3,int4@2.5"
FORMATS = "Q8_0,Q6_K,Q5_K_M,Q4_K_M,Q4_0,IQ4_XS,Q3_K_M,IQ3_S,Q2_K"
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
STEP_COLUMNS = {
    "training": "training",
    "batch": "batch",
    "context": "context",
    "ms_per_step": "ms/step",
    "time_ratio": "time ratio",
    "mbytes": "MB",
    "memory_ratio": "memory ratio",
}
Dtype = Annotated[str, typer.Option(help="fp32, bf16 or fp16.")]
Sparsities = Annotated[str, typer.Option("--sparsity", help="FFN sparsities, separated by commas.")]
ExpertSize = Annotated[int, typer.Option(help="Neurons per expert.")]
Bits = Annotated[int, typer.Option(help="Bits of a weight of the copy.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; the GPU where there is one.")]
Threads = Annotated[int | None, typer.Option(help="Threads; torch's number by default.")]


@bench_app.command("grouping")
def bench_grouping(json_file: JsonFile = None) -> None:
    """Time balanced k-means and compare its cost with k-means-constrained."""
    from lte.bench.grouping import bench_grouping as run

    rows = run()
    write_json(json_file, {"rows": rows})
    table = Table(*rows[0].keys())
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)


@bench_app.command("step")
def bench_step(
    model: Annotated[str, typer.Option(help="Dense model: folder, hub id or .gguf file.")],
    batch: Annotated[int, typer.Option(min=1, help="Rows per step.")] = 4,
    context: Annotated[int, typer.Option(min=2, help="Tokens per row.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of six steps, of each kind.")] = 4,
    json_file: JsonFile = None,
) -> None:
    """Cost of a training step with a target sparsity against one of ordinary fine-tuning."""
    import torch

    from lte.bench.step import bench_step as run
    from lte.hub import default_device, load_dense

    dense = load_dense(model, dtype=torch.float32)
    with _status() as status:
        rows = run(dense, batch=batch, context=context, rounds=rounds, report=status)
    _print_rows(rows, STEP_COLUMNS, model, json_file, default_device())


@bench_app.command("ffn")
def bench_ffn(
    d_model: Annotated[int, typer.Option(help="Width of the residual stream.")] = 4096,
    d_ff: Annotated[int, typer.Option(help="Neurons.")] = 11008,
    dtype: Dtype = "bf16",
    sparsity: Sparsities = "0,0.5,0.75,0.9",
    tokens: Annotated[str, typer.Option(help="Tokens per call, separated by commas.")] = "1",
    expert_size: ExpertSize = 32,
    router: Annotated[
        str, typer.Option(help="linear; copy: the FFN's own coarse copy decides; mask: given, at no cost.")
    ] = "linear",
    bits: Bits = 3,
    weights: Annotated[
        str | None, typer.Option(help="Of the sparse FFN, int8 or int4 for instance; those of --dtype by default.")
    ] = None,
    impl: Annotated[str, typer.Option(help="auto, reference, cpu or triton.")] = "auto",
    threads: Threads = None,
    device: Device = None,
    json_file: JsonFile = None,
) -> None:
    """Time one FFN, dense against sparse, router included, and say how close it comes to the memory's limit."""
    from lte.bench.ffn import bench_ffn as run
    from lte.options import bits_of

    _set_threads(threads)
    where = _device(device)
    with _status() as progress:
        rows, crossover = run(
            d_model=d_model,
            d_ff=d_ff,
            dtype=dtype,
            sparsities=numbers(sparsity, "sparsity"),
            tokens=whole_numbers(tokens, "tokens"),
            expert_size=expert_size,
            router=router,
            bits=bits,
            weights=None if weights is None else bits_of(weights),
            impl=impl,
            device=where,
            progress=progress,
        )
    _print_rows(
        rows, FFN_COLUMNS, f"{d_model} x {d_ff}, {dtype}; dense: {rows[0]['baseline']}", json_file, where, crossover
    )


@bench_app.command("decode")
def bench_decode(
    config: Annotated[
        str, typer.Option(help="Shape with random weights; see `lte bench limit` for names.")
    ] = "llama-1.2b",
    model: Annotated[str | None, typer.Option(help="A trained sparse model instead, at the sparsity it has.")] = None,
    dtype: Dtype = "bf16",
    sparsity: Sparsities = "0,0.5,0.8",
    batch: Annotated[int, typer.Option(help="Sequences decoded together.")] = 1,
    new_tokens: Annotated[int, typer.Option(help="Tokens per turn.")] = 32,
    rounds: Annotated[int, typer.Option(help="Turns per engine.")] = 3,
    weights: Annotated[
        str, typer.Option(help="Those of --dtype and of few bits, e.g. bf16,int8,int4; int4 alone holds no other copy.")
    ] = "",
    bits_per_token: Annotated[
        str, typer.Option(help="Of an FFN weight of few bits, with --method self-prediction, e.g. 4,3.2.")
    ] = "",
    method: Annotated[str, typer.Option(help="lte: linear routers; self-prediction: the FFN's own copy.")] = "lte",
    expert_size: Annotated[int | None, typer.Option(help="Neurons per expert; the method's own by default.")] = None,
    compile_: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Also torch.compile (takes minutes).")
    ] = True,
    llama_cpp: Annotated[bool, typer.Option("--llama-cpp/--no-llama-cpp", help="Also llama.cpp, if installed.")] = True,
    threads: Threads = None,
    device: Device = None,
    json_file: JsonFile = None,
) -> None:
    """Time `generate`: transformers, transformers compiled, lte at each sparsity, and llama.cpp, side by side."""
    from lte.bench.decode import bench_decode as run
    from lte.config import method_config
    from lte.options import bits_of

    _set_threads(threads)
    where = _device(device)
    named = [name for name in weights.split(",") if name] or [dtype]
    with _status() as progress:
        rows, crossover = run(
            config_name=config,
            model_folder=model,
            dtype=dtype,
            sparsities=numbers(sparsity, "sparsity"),
            batch=batch,
            new_tokens=new_tokens,
            rounds=rounds,
            method=method_config(method, {} if expert_size is None else {"expert_size": expert_size}),
            weights=[bits_of(name) for name in named if name != dtype],
            plain=dtype in named,
            bits_per_token=numbers(bits_per_token, "bits_per_token") if bits_per_token else (),
            compiled=compile_,
            with_llama_cpp=llama_cpp,
            device=where,
            progress=progress,
        )
    _print_rows(rows, DECODE_COLUMNS, f"{model or config}, {dtype}, batch {batch}", json_file, where, crossover)


@bench_app.command("prefill")
def bench_prefill(
    config: Annotated[
        str, typer.Option(help="Shape with random weights; see `lte bench limit` for names.")
    ] = "llama-1.2b",
    dtype: Dtype = "bf16",
    tokens: Annotated[str, typer.Option(help="Of the prompts, separated by commas.")] = "8,32,100,512,2048",
    sparsity: Sparsities = "0,0.5,0.8",
    rounds: Annotated[int, typer.Option(help="Turns per engine.")] = 3,
    method: Annotated[str, typer.Option(help="lte: linear routers; self-prediction: the FFN's own copy.")] = "lte",
    expert_size: Annotated[int | None, typer.Option(help="Neurons per expert; the method's own by default.")] = None,
    llama_cpp: Annotated[bool, typer.Option("--llama-cpp/--no-llama-cpp", help="Also llama.cpp, if installed.")] = True,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Time prompts on the CPU: stock transformers, lte at each sparsity, and llama.cpp, side by side."""
    from lte.bench.prefill import bench_prefill as run
    from lte.config import method_config

    _set_threads(threads)
    with _status() as progress:
        rows, crossover = run(
            config_name=config,
            dtype=dtype,
            tokens=whole_numbers(tokens, "tokens"),
            sparsities=numbers(sparsity, "sparsity"),
            rounds=rounds,
            method=method_config(method, {} if expert_size is None else {"expert_size": expert_size}),
            with_llama_cpp=llama_cpp,
            progress=progress,
        )
    _print_rows(rows, PREFILL_COLUMNS, f"{config}, {dtype}", json_file, _device("cpu"), crossover)


@bench_app.command("front")
def bench_front(
    model: Annotated[str, typer.Argument(help="Dense model: folder, hub id or .gguf file.")],
    data: Annotated[str, typer.Option(help="Text by which weights are rounded.")],
    eval_data: Annotated[str, typer.Option(help="Text whose tokens are predicted.")],
    ours: Annotated[str, typer.Option(help="Widths, with commas; int4@3.2 reads 3.2 bits by need.")] = OURS,
    formats: Annotated[str, typer.Option(help="Of llama.cpp, with commas; nothing for none.")] = FORMATS,
    steps: Annotated[int, typer.Option(min=0, help="Of training the scales: a second row for every width.")] = 0,
    steps_for: Annotated[str, typer.Option(help="Which of the widths are trained; all, unless some are named.")] = "",
    context_length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the data for rounding.")] = 8192,
    eval_tokens: Annotated[int, typer.Option(min=1, help="Tokens predicted.")] = 8192,
    group: Annotated[int, typer.Option(help="Weights of ours that share a scale.")] = 64,
    head: Annotated[str, typer.Option(help="Of head and embeddings of ours.")] = "int8",
    new_tokens: Annotated[int, typer.Option(help="Tokens per turn of the timing.")] = 32,
    rounds: Annotated[int, typer.Option(help="Turns per engine.")] = 3,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Loss, KL divergence, bits read and ms per token of ours at several widths, beside llama.cpp's formats."""
    from lte.bench.front import Width
    from lte.bench.front import bench_front as run
    from lte.options import bits_of
    from lte.tasks import TaskConfig, build_task

    _set_threads(threads)
    with _status() as progress:
        rows = run(
            model,
            data,
            eval_data,
            build_task(TaskConfig(name="lm", context_length=context_length)),
            ours=[Width.parse(name) for name in ours.split(",") if name],
            formats=[name for name in formats.split(",") if name],
            steps=steps,
            trained=[Width.parse(name) for name in steps_for.split(",") if name] or None,
            tokens=tokens,
            eval_tokens=eval_tokens,
            group=group,
            head_bits=bits_of(head),
            new_tokens=new_tokens,
            rounds=rounds,
            progress=progress,
        )
    _print_rows(rows, FRONT_COLUMNS, model, json_file, _device("cpu"))


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
        list(SHAPES) if config is None else [config],
        numbers(sparsity, "sparsity"),
        expert_size=expert_size,
        context=context,
    )
    _print_rows(rows, LIMIT_COLUMNS, f"batch 1, bf16, {expert_size} neurons per expert", json_file, _device("cpu"))


@bench_app.command("gpu")
def bench_gpu(
    json_file: JsonFile = None,
    quick: Annotated[bool, typer.Option(help="Correctness and one FFN shape only.")] = False,
    seconds: Annotated[float, typer.Option(help="After so many, no further part is begun.")] = 300.0,
) -> None:
    """Everything a GPU should answer, in under eight minutes: correctness first, then FFN and whole-model speed."""
    from lte.bench.gpu import bench_gpu as run

    with _status() as progress:
        save = partial(write_json, json_file)
        result = run(quick=quick, seconds=seconds, save=save, progress=progress)
    write_json(json_file, result)
    _print_table(
        result["correctness"], {"case": "case", "max_error": "error", "tolerance": "tolerance", "status": "status"}
    )
    _print_table(result["ffn"], {"weights": "weights", **FFN_COLUMNS}, "LLaMA-2-7B FFN, CUDA graph")
    _print_table(result["decode"], {"tokens": "batch", **DECODE_COLUMNS}, "whole model, CUDA graph")


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        if not 1 <= threads <= 4096:
            raise ConfigError(f"threads={threads} is out of range; it is from 1 to 4096")
        import torch

        torch.set_num_threads(threads)


def _device(name: str | None) -> Any:
    """The torch device of a name; by default the GPU where there is one."""
    import torch

    from lte.hub import default_device

    if name is None:
        return default_device()
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name!r} is unknown; choose cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no GPU is visible to torch; choose cpu")
    return torch.device(name)


@contextmanager
def _status() -> Iterator[Callable[[str], None]]:
    """A line that says what is going on; lasting lines where the output is no terminal."""
    if not console.is_terminal:
        yield lambda line: typer.echo(line, err=True)
        return
    with console.status("") as status:
        yield status.update


def _print_rows(
    rows: list[dict[str, Any]],
    columns: dict[str, str],
    title: str,
    json_file: Path | None,
    device: Any,
    crossover: Any = None,
) -> None:
    """Table, what was measured about the crossover, and the JSON."""
    from lte.bench.rows import report

    _print_table(rows, columns, title)
    if crossover is not None:
        console.print(crossover.describe())
    more = {} if crossover is None else {"crossover": crossover.describe()}
    write_json(json_file, report(rows, command_line(), device, **more))


def _print_table(rows: list[dict[str, Any]], columns: dict[str, str], title: str = "") -> None:
    from lte.bench.rows import table

    # A pipe or a log has no width to fit.
    wide = console if console.is_terminal else Console(width=160, soft_wrap=True)
    wide.print(table(rows, columns, title))
    for row in rows:
        if row.get("status", "ok") != "ok":
            wide.print(f"{row.get('engine') or row.get('case') or row.get('backend')}: {row['status']}")
