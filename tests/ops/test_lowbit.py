"""Matrices of a few bits: what is stored is what is meant, and scales are no worse than the plain ones."""

from __future__ import annotations

import pytest
import torch

from lte.ops.lowbit import LowBitMatrix, quantize, round_inputs


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("columns", "group"), [(128, 64), (100, 64), (64, 32), (7, 32)])
def test_numbers_on_the_grid_are_kept(bits, columns, group, by_columns):
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(2**bits, (5, columns), generator=generator) - (2**bits - 1) / 2
    levels[:, ::8] = (2**bits - 1) / 2  # every group meets its outermost level
    scale = torch.tensor([0.5, 1.0, 2.0, 0.125, 0.25])[:, None]
    made = quantize(levels * scale, bits, group, by_columns=by_columns)
    assert (made.bits, made.group, made.columns) == (bits, group, columns)
    torch.testing.assert_close(made.dequantize(), levels * scale)


@pytest.mark.parametrize(("bits", "error"), [(1, 0.7), (2, 0.36), (3, 0.2), (4, 0.11)])
def test_the_error_on_normal_weights(bits, error):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    made = quantize(weight, bits, 64)
    assert float((made.dequantize() - weight).square().mean().sqrt()) < error
    assert made.bits_per_weight == bits + 0.25


def test_where_codes_lie_in_a_tile():
    levels = torch.zeros(17, 32) - 1.5
    levels[2, 9], levels[16, 31] = 0.5, 1.5  # codes 2 and 3 among codes 0
    made = quantize(levels, 2, 32)
    assert made.planes.shape == (2, 1, 1, 2, 64)
    assert [at.tolist() for at in made.planes.nonzero()] == [[0, 0, 0, 0, 9], [1, 0, 0, 1, 3]]
    assert made.planes[0, 0, 0, 0, 9] == 2 << 4  # the third of four codes
    assert made.planes[1, 0, 0, 1, 3] == 3 << 6  # the last of the second four
    assert quantize(levels[:1], 3, 32).codes().unique().numel() <= 8


def test_three_bits_leave_two_codes_for_what_is_left():
    levels = torch.arange(32).float().div(4, rounding_mode="floor")[None] - 3.5  # codes 0 to 7, four times each
    made = quantize(levels, 3, 32)
    wanted = [1 << 3, 2 | 3 << 3, 4 | 5 << 3]  # 0 and 1, 2 and 3, 4 and 5; of 6 and 7 bits 0, 1 and 2
    for plane, byte in enumerate(wanted):
        byte |= (6 >> plane & 1) << 6 | (7 >> plane & 1) << 7
        assert made.planes[0, 0, 0, plane, :4].tolist() == [byte] * 4
    assert made.codes()[0, 0].tolist() == [i // 4 for i in range(32)]


def test_scales_go_where_errors_count():
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    weight[:, 0] = 4.0
    importance = torch.ones(64)
    importance[0] = 0.0
    plain, weighted = quantize(weight, 2, 64), quantize(weight, 2, 64, importance)
    error = [(made.dequantize() - weight)[:, 1:].square().mean() for made in (plain, weighted)]
    assert error[1] < error[0]


def test_zeros_stay_near_zero():
    assert quantize(torch.zeros(2, 64), 3, 64).dequantize().abs().max() < 1e-6


@pytest.mark.parametrize(("bits", "group"), [(0, 64), (9, 64), (3, 48), (3, 0)])
def test_widths_that_there_are_not(bits, group):
    with pytest.raises(ValueError, match=f"bits={bits}, group={group}"):
        quantize(torch.zeros(2, 64), bits, group)


def test_inputs_are_rounded_to_eight_bits_of_their_group():
    x = torch.randn(2, 3, 100, generator=torch.Generator().manual_seed(3))
    x[0, 0, 0] = 1000.0
    found = round_inputs(x, 64)
    assert found.shape == x.shape
    assert float(found[0, 0, 0]) == pytest.approx(1000.0)
    assert float((found - x)[0, 0, :64].abs().max()) <= 1000 / 127 / 2 + 1e-3
    largest = x[0, 0, 64:].abs().max()
    assert float((found - x)[0, 0, 64:].abs().max()) <= float(largest) / 127 / 2 + 1e-6
    assert isinstance(quantize(x[0], 2), LowBitMatrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("columns", "group"), [(128, 64), (100, 64), (48, 96), (7, 32)])
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_kernels_round_as_torch_does(isa, dtype, columns, group, bits, by_columns, monkeypatch):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(33, columns, generator=generator).to(dtype)
    importance = torch.rand(columns, generator=generator)
    made = [quantize(weight, bits, group, given, by_columns=by_columns) for given in (None, importance)]
    monkeypatch.setattr("lte.ops.lowbit.quantizes_fast", lambda matrix: False)
    for fast, given in zip(made, (None, importance), strict=True):
        plain = quantize(weight, bits, group, given, by_columns=by_columns)
        same = fast.scales_of_rows() == plain.scales_of_rows()
        assert same.float().mean() > 0.98  # errors that are as good as equal
        assert torch.equal(fast.codes()[same], plain.codes()[same])


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("rows", "columns", "group"), [(37, 70, 32), (64, 256, 64), (5, 33, 128), (16, 1, 32)])
def test_kernels_write_out_the_very_numbers(isa, rows, columns, group, bits, by_columns):
    made = quantize(torch.randn(rows, columns), bits, group, by_columns=by_columns)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(made.dequantize(dtype), made.dequantize_reference(dtype))
    half = made if by_columns or rows % 32 else made.halves()[1]
    assert torch.equal(half.dequantize(), half.dequantize_reference())
