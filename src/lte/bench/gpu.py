"""Everything a GPU should answer, in one command: correctness first, then one FFN, then a whole model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from lte.bench.checks import relative_error
from lte.bench.decode import bench_decode
from lte.bench.ffn import bench_ffn
from lte.bench.machine import copy_gbytes_per_s
from lte.bench.rows import TOLERANCE, Row
from lte.bench.shapes import bias_for
from lte.errors import BackendError
from lte.methods import SelfPredictionConfig
from lte.ops import (
    ACTIVATIONS,
    FFNCopy,
    FFNWeights,
    QuantizedFFN,
    copy_scores,
    copy_scores_reference,
    nested_ffn,
    quantized_ffn,
    quantized_linear,
    route,
    routed_ffn,
    sparse_ffn,
    sparse_ffn_reference,
)
from lte.ops.lowbit import quantize
from lte.ops.nested import NestedFFN, NestedMatrix, NestedRows, nested_ffn_reference
from lte.ops.quantized import quantized_ffn_reference, quantized_linear_reference
from lte.versions import versions


def bench_gpu(
    *,
    quick: bool = False,
    seconds: float = 300.0,
    save: Callable[[dict[str, Any]], None] = lambda result: None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """``correctness``, ``ffn`` and ``decode`` rows, and what they were measured on.

    Speed is measured only where every correctness case passed.

    Args:
        quick: correctness and one token of an FFN only.
        seconds: after which no further part is begun; ``left_out`` names what was not.
        save: given what is there after every part.
        progress: told what is being measured.

    Raises:
        BackendError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise BackendError("no GPU is visible to torch; `lte bench ffn` and `lte bench decode` measure the CPU")
    started, device = time.perf_counter(), torch.device("cuda")
    progress("correctness against the float32 reference")
    correctness = [_case(*case, device=device) for case in _cases()]
    correctness += [_few_bits_case(bits, tokens, device) for bits in (4, 8) for tokens in (1, 5, 64)]
    correctness += [_linear_case(bits, tokens, device) for bits in (4, 8) for tokens in (1, 5, 100)]
    correctness += [_copy_case(tokens, device) for tokens in (1, 5, 64)]
    correctness += [
        _planes_case(*planes, tokens, device) for planes in ((4, 0), (4, 4), (3, 1)) for tokens in (1, 5, 64)
    ]
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
    for name, part in _parts(progress)[: 3 if quick else None]:
        if time.perf_counter() - started > seconds:
            result["left_out"].append(f"{name}: no time left")
            continue
        try:
            result["decode" if name.startswith("decode") else "ffn"] += part()
        except Exception as error:  # noqa: BLE001 - the other parts are still worth having
            result["left_out"].append(f"{name}: {type(error).__name__}: {str(error).strip()[:300]}")
        torch.cuda.empty_cache()
        save(result)
    result["seconds"] = time.perf_counter() - started
    return result


def _tune(device: torch.device) -> None:
    """Autotune one token of the FFN measured below, at half of its experts; the configuration is kept on disk."""
    from lte.ops.triton import autotune

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16) * shape[-1] ** -0.5

    weights = FFNWeights(up=draw(11008, 4096), down=draw(11008, 4096), gate=draw(11008, 4096))
    autotune(draw(1, 4096), weights, torch.rand(1, 344, device=device) > 0.5)


def _parts(progress: Callable[[str], None]) -> list[tuple[str, Callable[[], list[Row]]]]:
    """What is measured, most wanted first."""
    ffn = partial(bench_ffn, device=torch.device("cuda"), rounds=30, progress=progress)
    decode = partial(
        bench_decode,
        config_name="llama-2-7b",
        new_tokens=64,
        rounds=2,
        device=torch.device("cuda"),
        seconds=240,
        progress=progress,
    )

    def rows(measure: Callable[..., tuple[list[Row], Any]], **settings: Any) -> Callable[[], list[Row]]:
        return lambda: measure(**settings)[0]

    one = (0.0, 0.5, 0.75, 0.9)
    return [
        ("ffn 4096 x 11008 bf16", rows(ffn, sparsities=one)),
        ("ffn 4096 x 11008 int8", rows(ffn, weights=8, sparsities=one)),
        ("ffn 4096 x 11008 int4", rows(ffn, weights=4, sparsities=one)),
        ("decode llama-2-7b bf16, int4", rows(decode, weights=(4,), sparsities=(0.5, 0.8, 0.0))),
        ("ffn 4096 x 11008 bf16, copy of 3 bits", rows(ffn, router="copy", expert_size=1, sparsities=(0.5, 0.8))),
        (
            "decode llama-2-7b int4, self-prediction",
            rows(decode, weights=(4,), plain=False, method=SelfPredictionConfig(expert_size=1), sparsities=(0.5, 0.8)),
        ),
        ("ffn 4096 x 11008 bf16, batches", rows(ffn, sparsities=(0.5, 0.8), tokens=(4, 8, 16, 32))),
        ("ffn 4096 x 11008 int4, batches", rows(ffn, weights=4, sparsities=(0.0, 0.8), tokens=(4, 8, 16, 32))),
        ("ffn 4096 x 11008 fp16", rows(ffn, dtype="fp16", sparsities=(0.5, 0.9))),
        ("decode llama-2-7b bf16, batch 8", rows(decode, sparsities=(0.8,), batch=8)),
    ]


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
    error = max(relative_error(y, wanted) for y in got)
    name = str(dtype).removeprefix("torch.")
    kind = "gated" if gated else "plain"
    return _verdict(f"{name} {activation} {kind} T={tokens} sparsity={sparsity:g}", error, dtype, got[0], got[2])


def _verdict(name: str, error: float, dtype: torch.dtype, first: Tensor, again: Tensor) -> Row:
    row: Row = {"case": name, "max_error": error, "tolerance": TOLERANCE[dtype], "status": "ok"}
    if not error <= TOLERANCE[dtype]:
        row["status"] = "failed: error above tolerance"
    elif not torch.equal(first, again):
        row["status"] = "failed: two runs differ"
    return row


def _few_bits_case(bits: int, tokens: int, device: torch.device) -> Row:
    generator = torch.Generator().manual_seed(bits)
    d_model, d_ff, n_experts, dtype = 520, 1152, 36, torch.bfloat16

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(shape[-1] ** -0.5).to(device, dtype)

    weights = FFNWeights(up=draw(d_ff, d_model), down=draw(d_ff, d_model), gate=draw(d_ff, d_model))
    made = QuantizedFFN.of(weights, bits)
    x_TD, mask = draw(tokens, d_model) * d_model**0.5, draw(tokens, n_experts) > 0
    wanted = quantized_ffn_reference(x_TD.float(), made, mask)
    got = [quantized_ffn(x_TD, made, mask) for _ in range(2)]
    return _verdict(f"int{bits} silu gated T={tokens} sparsity=0.5", relative_error(got[0], wanted), dtype, *got)


def _linear_case(bits: int, tokens: int, device: torch.device) -> Row:
    """A linear layer of few bits, as attention and LM head have them."""
    generator = torch.Generator().manual_seed(bits)
    weight_ND = torch.randn(1000, 520, generator=generator).mul_(520**-0.5).to(device)
    bias_N = torch.randn(1000, generator=generator).to(device, torch.bfloat16)
    x_TD = torch.randn(tokens, 520, generator=generator).to(device, torch.bfloat16)
    matrix = quantize(weight_ND, bits)
    wanted = quantized_linear_reference(x_TD.float(), matrix, bias_N.float())
    got = [quantized_linear(x_TD, matrix, bias_N) for _ in range(2)]
    return _verdict(f"int{bits} linear T={tokens}", relative_error(got[0], wanted), torch.bfloat16, *got)


def _copy_case(tokens: int, device: torch.device) -> Row:
    """Scores of neurons by a copy of 3 bits."""
    generator = torch.Generator().manual_seed(tokens)
    d_model, d_ff = 520, 1152

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(shape[-1] ** -0.5).to(device)

    up, gate, down = draw(d_ff, d_model), draw(d_ff, d_model), draw(d_ff, d_model)
    weights, x_TD = FFNWeights(up=up, down=down, gate=gate), draw(tokens, d_model) * d_model**0.5
    copied = FFNCopy(quantize(up, 3), down.norm(dim=1), quantize(gate, 3))
    wanted = copy_scores_reference(x_TD, copied, d_ff, weights)
    got = [copy_scores(x_TD, copied, d_ff, weights) for _ in range(2)]
    return _verdict(f"copy of 3 bits T={tokens}", relative_error(got[0], wanted), torch.bfloat16, *got)


def _planes_case(upper: int, lower: int, tokens: int, device: torch.device) -> Row:
    """An FFN of single neurons in two planes of bits."""
    generator = torch.Generator().manual_seed(tokens)
    d_model, d_ff, bits, dtype = 520, 1152, upper + lower, torch.bfloat16

    def codes(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        groups = -(-columns // 64)
        scales_NG = torch.full((rows, groups), (12 / columns) ** 0.5 / 2**bits, device=device)
        return torch.randint(2**bits, (rows, 64 * groups), generator=generator).to(device), scales_NG

    up, gate = (NestedMatrix.of(*codes(d_ff, d_model), bits, upper, d_model) for _ in range(2))
    # A third is out, a third coarse, a third fine, but where a hidden value is too small to matter.
    norms = 1e6 ** (torch.arange(d_ff, device=device) % 3 - 1)
    copied = FFNCopy(up.upper, norms, gate.upper)
    down = NestedRows.of(*codes(d_ff, d_model), bits, upper, d_model)
    weights = NestedFFN(copied, down, up.lower, gate.lower)
    x_TD = torch.randn(tokens, d_model, generator=generator).to(device, dtype)
    cuts = 0.003, 3000.0
    wanted = nested_ffn_reference(x_TD.float(), weights, *cuts)
    got = [nested_ffn(x_TD, weights, *cuts) for _ in range(2)]
    return _verdict(f"planes of {upper} and {lower} bits T={tokens}", relative_error(got[0], wanted), dtype, *got)
