"""FFNs in two planes: the kernels against their definition in PyTorch, and that against the numbers that are meant."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lte.ops import FFNCopy, cpu, few_bits, nested_ffn
from lte.ops.lowbit import best_scales, levels_of
from lte.ops.nested import NestedFFN, NestedMatrix, NestedRows, RowCodes, nested_ffn_reference
from tests.ops.test_quantized import close, random


def codes_of(matrix_ND: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    grouped = torch.nn.functional.pad(matrix_ND, (0, -matrix_ND.shape[1] % group)).unflatten(1, (-1, group))
    scales, middle = best_scales(grouped, torch.ones(grouped.shape[1:]), bits), (2**bits - 1) / 2
    return (levels_of(grouped, scales, middle) + middle).flatten(1), scales


def nested(
    d_model: int,
    d_ff: int,
    bits: int,
    coarse: int,
    *,
    group: int = 64,
    gated: bool = True,
    dtype: torch.dtype = torch.float32,
) -> NestedFFN:
    def tiles(seed: int) -> NestedMatrix:
        matrix = random(d_ff, d_model, seed=seed) / d_model**0.5
        return NestedMatrix.of(*codes_of(matrix, bits, group), bits, coarse, d_model)

    up, gate = tiles(1), tiles(2) if gated else None
    rows = random(d_ff, d_model, seed=3) / d_ff**0.5
    exact = torch.tensor([2, 31, d_ff - 1])
    down = NestedRows.of(*codes_of(rows, bits, group), bits, coarse, d_model, exact, rows[exact])
    return NestedFFN(
        copy=FFNCopy(up.upper, 0.5 + random(d_ff, seed=4).abs(), None if gate is None else gate.upper),
        down=down,
        up_lower=up.lower,
        gate_lower=None if gate is None else gate.lower,
        up_bias=None if gated else 0.1 * random(d_ff, seed=5).to(dtype),
        down_bias=None if gated else 0.1 * random(d_model, seed=6).to(dtype),
        activation="silu" if gated else "relu",
    )


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("columns", [64, 100, 576])
def test_codes_of_rows_come_back(bits, columns):
    codes = torch.randint(0, 2**bits, (5, columns), generator=torch.Generator().manual_seed(bits))
    packed = RowCodes.pack(codes, bits)
    assert packed.data.nbytes == 5 * -(-columns // 64) * 8 * bits
    assert torch.equal(packed.codes(), codes.to(torch.uint8))


@pytest.mark.parametrize(("bits", "coarse"), [(4, 3), (6, 4), (8, 4), (3, 3)])
def test_planes_together_are_the_codes_and_the_upper_one_is_the_nearest_of_fewer_bits(bits, coarse):
    codes, scales = codes_of(random(20, 130, seed=1), bits, 64)
    made = NestedMatrix.of(codes, scales, bits, coarse, 130)
    meant = ((codes - (2**bits - 1) / 2).unflatten(1, (-1, 64)) * scales.unsqueeze(-1)).flatten(1)[:, :130]
    torch.testing.assert_close(made.dequantize(), meant, rtol=1e-6, atol=1e-7)
    away = (made.dequantize() - made.upper.dequantize()).abs()
    step = made.upper.scales_of_rows().float().repeat_interleave(64, 1)[:, :130]
    assert (away <= step / 2).all()
    rows = NestedRows.of(codes, scales, bits, coarse, 130)
    torch.testing.assert_close(rows.coarse() + rows.correction(), meant, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("bits", "coarse"), [(4, 3), (3, 2), (6, 4), (8, 4), (3, 3), (4, 1)])
@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_neurons_are_out_coarse_or_fine(isa, bits, coarse, tokens, dtype):
    for d_model, d_ff, group, gated in ((100, 200, 64, True), (192, 64, 128, False), (64, 70, 64, True)):
        weights = nested(d_model, d_ff, bits, coarse, group=group, gated=gated, dtype=dtype)
        x = random(tokens, d_model, seed=9).to(dtype)
        for cut, fine in ((-1.0, -1.0), (-1.0, math.inf), (0.1, 0.3), (0.2, -1.0), (-1.0, 0.2), (1e9, 1e9)):
            found, wanted = cpu.nested_ffn(x, weights, cut, fine), nested_ffn_reference(x, weights, cut, fine)
            if cut == 1e9:
                torch.testing.assert_close(found, wanted)
            else:
                close(found, wanted)


def test_bits_are_counted():
    weights = nested(128, 64, 4, 3)
    exact = 16 * 3 / 64  # three rows of 64 are in 16 bits
    assert weights.bits_read(1.0, 1.0) == pytest.approx(4.25 + exact / 3)
    assert weights.bits_read(0.5, 0.2) == pytest.approx((2 * 3.25 + 0.5 * (3.25 + exact) + 0.2 * 3) / 3)


@pytest.mark.parametrize(("bits", "coarse", "gated"), [(4, 4, True), (8, 4, False), (4, 3, True)])
def test_what_a_gpu_is_given_is_the_same_network(bits, coarse, gated, monkeypatch):
    weights, x = nested(100, 64, bits, coarse, gated=gated), random(3, 100, seed=9)
    monkeypatch.setenv("LTE_BACKEND", "reference")
    again = few_bits._on_gpu_nested(x, *few_bits._flat_planes(weights), 0.1, 0.3)
    assert torch.equal(again, nested_ffn_reference(x, weights, 0.1, 0.3))


def test_a_graph_on_a_gpu_takes_it_as_one_operator():
    def there(made):
        if isinstance(made, torch.Tensor):
            return torch.empty(made.shape, dtype=made.dtype, device="cuda")
        if not is_dataclass(made):
            return made
        return replace(made, **{field.name: there(getattr(made, field.name)) for field in fields(made)})

    made = nested(100, 64, 8, 4)
    with FakeTensorMode():
        weights = there(made)
        y = nested_ffn(torch.empty(3, 100, device="cuda", dtype=torch.bfloat16), weights, 0.1, 0.3)
    assert (y.shape, y.dtype, y.device.type) == ((3, 100), torch.bfloat16, "cuda")
