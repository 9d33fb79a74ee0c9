"""Everything a GPU should answer, in one command: correctness first, then one FFN, then a whole model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from lte.bench.decode import bench_decode
from lte.bench.ffn import bench_ffn
from lte.bench.machine import copy_gbytes_per_s
from lte.bench.rows import TOLERANCE, Row
from lte.bench.shapes import bias_for
from lte.errors import BackendError
from lte.evaluate import versions
from lte.ops import ACTIVATIONS, FFNWeights, route, routed_ffn, sparse_ffn, sparse_ffn_reference

BUDGET_SECONDS = 450.0


def bench_gpu(*, quick: bool = False, progress: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """``correctness``, ``ffn`` and ``decode`` rows, and what they were measured on.

    Speed is measured only where every correctness case passed. Parts that no longer fit into the time are left out, and
    ``left_out`` names them.

    Raises:
        BackendError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise BackendError("no GPU is visible to torch; `lte bench ffn` and `lte bench decode` measure the CPU")
    started, device = time.perf_counter(), torch.device("cuda")
    progress("correctness against the float32 reference")
    correctness = [_case(*case, device=device) for case in _cases()]
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(device),
        "copy_gbytes_per_s": copy_gbytes_per_s(device),
        "versions": versions(),
        "correctness": correctness,
        "ffn": [],
        "decode": [],
        "left_out": [],
    }
    if any(row["status"] != "ok" for row in correctness):
        result["left_out"].append("speed: a correctness case failed")
        return result
    progress("tuning the kernels for one token")
    _tune(device)
    plan: list[tuple[str, Callable[[], list[Row]]]] = [
        ("ffn 4096 x 11008 bf16", lambda: _ffn("bf16", (0.0, 0.5, 0.75, 0.9), (1,), progress)),
        ("ffn 4096 x 11008 bf16, batches", lambda: _ffn("bf16", (0.5, 0.8), (4, 8, 16, 32), progress)),
        ("decode llama-2-7b bf16", lambda: _decode((0.0, 0.5, 0.8), 1, progress)),
        ("ffn 4096 x 11008 fp16", lambda: _ffn("fp16", (0.5, 0.9), (1,), progress)),
        ("decode llama-2-7b bf16, batch 8", lambda: _decode((0.8,), 8, progress)),
    ]
    for name, part in plan[:1] if quick else plan:
        if time.perf_counter() - started > BUDGET_SECONDS * 0.75:
            result["left_out"].append(f"{name}: no time left")
            continue
        result["decode" if name.startswith("decode") else "ffn"] += part()
        torch.cuda.empty_cache()
    result["seconds"] = time.perf_counter() - started
    return result


def _tune(device: torch.device) -> None:
    """Autotune one token of the FFN measured below, at half of its experts; the configuration is kept on disk."""
    from lte.ops.triton import autotune

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16) * shape[-1] ** -0.5

    weights = FFNWeights(up=draw(11008, 4096), down=draw(11008, 4096), gate=draw(11008, 4096))
    autotune(draw(1, 4096), weights, torch.rand(1, 344, device=device) > 0.5)


def _ffn(
    dtype: str, sparsities: tuple[float, ...], tokens: tuple[int, ...], progress: Callable[[str], None]
) -> list[Row]:
    return bench_ffn(
        dtype=dtype, sparsities=sparsities, tokens=tokens, device=torch.device("cuda"), rounds=30, progress=progress
    )[0]


def _decode(sparsities: tuple[float, ...], batch: int, progress: Callable[[str], None]) -> list[Row]:
    return bench_decode(
        config_name="llama-2-7b",
        sparsities=sparsities,
        batch=batch,
        new_tokens=64,
        device=torch.device("cuda"),
        progress=progress,
    )[0]


Case = tuple[torch.dtype, str, bool, int, float]


def _cases() -> Iterator[Case]:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    yield from product(dtypes, ("silu",), (True,), (1, 5, 17, 64), (0.5,))
    yield from product((torch.bfloat16,), [a for a in ACTIVATIONS if a != "silu"], (True, False), (1, 17), (0.5,))
    yield from product((torch.bfloat16,), ("silu",), (True,), (1, 4, 70), (0.0, 0.9, 1.0))


def _case(dtype: torch.dtype, activation: str, gated: bool, tokens: int, sparsity: float, device: torch.device) -> Row:
    generator = torch.Generator(device=device).manual_seed(0)
    d_model, d_ff, n_experts = 520, 1152, 36

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).mul_(shape[-1] ** -0.5).to(dtype)

    weights = FFNWeights(
        up=draw(d_ff, d_model),
        down=draw(d_ff, d_model),
        gate=draw(d_ff, d_model) if gated else None,
        up_bias=draw(d_ff),
        down_bias=draw(d_model),
        activation=activation,
    )
    x_TD = torch.randn(tokens, d_model, generator=generator, device=device).to(dtype)
    router = draw(n_experts, d_model)
    logits = x_TD.float() @ router.float().T
    bias = torch.full((n_experts,), {0.0: 1e4, 1.0: -1e4}.get(sparsity, 0.0), device=device, dtype=dtype)
    if 0 < sparsity < 1:
        bias += bias_for(logits, sparsity)
    mask = route(x_TD, router, bias) > 0.5
    wanted = sparse_ffn_reference(x_TD.float(), weights.float(), mask)
    got = [
        sparse_ffn(x_TD, weights, mask, impl="triton"),
        routed_ffn(x_TD, router, bias, 0.5, weights, impl="triton"),
        sparse_ffn(x_TD, weights, mask, impl="triton"),
    ]
    scale = wanted.abs().max().clamp_min(1e-6)
    error = max(float((y.float() - wanted).abs().max() / scale) for y in got)
    name = str(dtype).removeprefix("torch.")
    row: Row = {
        "case": f"{name} {activation} {'gated' if gated else 'plain'} T={tokens} sparsity={sparsity:g}",
        "max_error": error,
        "tolerance": TOLERANCE[dtype],
        "status": "ok",
    }
    if not error <= TOLERANCE[dtype]:
        row["status"] = "failed: error above tolerance"
    elif not torch.equal(got[0], got[2]):
        row["status"] = "failed: two runs differ"
    return row
