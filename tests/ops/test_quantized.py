"""Layers of few bits: the kernels against their definition in PyTorch, and that against the weights rounded."""

from __future__ import annotations

import pytest
import torch

from lte.errors import ConfigError
from lte.ops import FFNWeights, cpu, sparse_ffn_reference
from lte.ops.lowbit import quantize
from lte.ops.quantized import QuantizedFFN, quantized_ffn_reference, quantized_linear_reference


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ffn(d_model: int, d_ff: int, *, gated: bool, biased: bool, activation: str, dtype: torch.dtype) -> FFNWeights:
    def bias(size: int, seed: int) -> torch.Tensor | None:
        return 0.1 * random(size, seed=seed).to(dtype) if biased else None

    return FFNWeights(
        up=random(d_ff, d_model, seed=1) / d_model**0.5,
        down=random(d_ff, d_model, seed=2) / d_ff**0.5,
        gate=random(d_ff, d_model, seed=3) / d_model**0.5 if gated else None,
        up_bias=bias(d_ff, 4),
        gate_bias=bias(d_ff, 5) if gated else None,
        down_bias=bias(d_model, 6),
        activation=activation,
    )


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    # Where a value lies between two of 8 bits, the last bit of a sum decides.
    limit = 2e-3 if found.dtype == torch.float32 else 1e-2
    assert (found.float() - wanted.float()).norm() <= limit * wanted.float().norm()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_a_linear_layer(isa, bits, tokens):
    for rows, columns, group, dtype in ((33, 100, 64, torch.float32), (64, 128, 32, torch.bfloat16)):
        weight = quantize(random(rows, columns, seed=bits), bits, group)
        x, bias = random(tokens, columns, seed=7).to(dtype), random(rows, seed=8).to(dtype)
        close(cpu.quantized_linear(x, weight, bias), quantized_linear_reference(x, weight, bias))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("tokens", [1, 2, 4, 7, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_ffn_over_some_experts(isa, bits, tokens, dtype):
    for gated, activation, size, group in ((True, "silu", 32, 32), (False, "relu", 64, 32), (True, "gelu", 64, 64)):
        weights = ffn(100, 4 * size, gated=gated, biased=not gated, activation=activation, dtype=dtype)
        made = QuantizedFFN.of(weights, bits, group)
        x, mask = random(tokens, 100, seed=9).to(dtype), random(tokens, 4, seed=10) > 0
        mask[:, 2] = False  # an expert that no token uses
        close(cpu.quantized_ffn(x, made, mask), quantized_ffn_reference(x, made, mask))
        share = random(tokens, 4, seed=11).abs()
        close(cpu.quantized_ffn(x, made, share), quantized_ffn_reference(x, made, share))
        router = random(4, 100, seed=12), random(4, seed=13), 0.5
        decided = torch.sigmoid(x.float() @ router[0].T + router[1]) > 0.5
        close(cpu.quantized_ffn(x, made, router=router), quantized_ffn_reference(x, made, decided))


@pytest.mark.parametrize("d_ff", [96, 80, 7])
def test_a_dense_ffn_of_any_width(isa, d_ff):
    weights = ffn(48, d_ff, gated=True, biased=True, activation="silu", dtype=torch.float32)
    for group in (32, 64):
        made = QuantizedFFN.of(weights, 8, group)
        x = random(3, 48, seed=1)
        close(cpu.quantized_ffn(x, made), quantized_ffn_reference(x, made))


def test_eight_bits_are_nearly_what_was_rounded():
    weights = ffn(128, 256, gated=True, biased=False, activation="silu", dtype=torch.float32)
    x, exact = random(16, 128, seed=3), sparse_ffn_reference(random(16, 128, seed=3), weights)
    errors = [
        float((quantized_ffn_reference(x, QuantizedFFN.of(weights, bits), None) - exact).norm() / exact.norm())
        for bits in (8, 6, 4, 3)
    ]
    assert errors == sorted(errors)
    assert errors[0] < 0.02  # most of it of the inputs and hidden values, which have 8 bits as well
    assert errors[2] < 0.15


def test_the_result_does_not_depend_on_the_number_of_threads():
    if cpu.unavailable():
        pytest.skip(cpu.unavailable())
    made = QuantizedFFN.of(ffn(256, 512, gated=True, biased=False, activation="silu", dtype=torch.float32), 4)
    x, mask, threads = random(5, 256, seed=1), random(5, 16, seed=2) > 0, torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(cpu.quantized_ffn(x, made, mask))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_experts_must_have_whole_groups():
    made = QuantizedFFN.of(ffn(64, 96, gated=True, biased=False, activation="silu", dtype=torch.float32), 4)
    made.check_experts(3)
    for n_experts in (96, 6, 5, 0):
        with pytest.raises(ConfigError, match=f"{n_experts} experts of 96 neurons"):
            made.check_experts(n_experts)


@pytest.mark.parametrize("tokens", [1, 7])
def test_threads_do_not_write_over_each_other(isa, tokens):
    """Where the width is no whole number of blocks of rows, the last one writes beyond it."""
    weights = ffn(100, 128, gated=True, biased=False, activation="silu", dtype=torch.float32)
    made, x = QuantizedFFN.of(weights, 4, 32), random(tokens, 100, seed=9)
    wanted, before = quantized_ffn_reference(x, made), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(50):
            close(cpu.quantized_ffn(x, made), wanted)
    finally:
        torch.set_num_threads(before)
