"""Rounding that looks at the inputs: closer outputs than rounding each weight by itself."""

from __future__ import annotations

import pytest
import torch

from lte.ops.lowbit import nearest_codes, quantize
from lte.ops.nested import NestedMatrix, NestedRows
from lte.rounding import compensated_codes, compensated_columns, round_compensated


def inputs(columns: int, tokens: int = 512) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(columns, columns, generator=generator) / columns**0.5
    return torch.randn(tokens, columns, generator=generator) @ (mixed + torch.eye(columns))


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize(("bits", "columns", "group"), [(2, 96, 32), (3, 128, 64), (4, 100, 32), (8, 64, 32)])
def test_outputs_are_closer(bits, columns, group, by_columns):
    x, weight = inputs(columns), torch.randn(40, columns, generator=torch.Generator().manual_seed(1))
    made = round_compensated(weight, x.T @ x, bits, group, by_columns=by_columns)
    assert (made.bits, made.group, made.rows, made.columns, made.by_columns) == (bits, group, 40, columns, by_columns)
    plain = quantize(weight, bits, group)
    errors = [(x @ (each.dequantize() - weight).T).square().sum() for each in (made, plain)]
    assert errors[0] < 0.75 * errors[1]


def test_where_inputs_are_independent_nothing_is_made_up_for():
    weight = torch.randn(20, 64, generator=torch.Generator().manual_seed(1))
    made, plain = round_compensated(weight, torch.eye(64), 3, 32), quantize(weight, 3, 32)
    torch.testing.assert_close(made.dequantize(), plain.dequantize())


def test_inputs_that_never_vary_do_no_harm():
    x = inputs(64)
    x[:, 5] = 0
    x[:, 6] = x[:, 7]
    weight = torch.randn(20, 64, generator=torch.Generator().manual_seed(1))
    made = round_compensated(weight, x.T @ x, 4, 32).dequantize()
    assert torch.isfinite(made).all()
    assert (x @ (made - weight).T).norm() < 0.2 * (x @ weight.T).norm()
    assert torch.isfinite(round_compensated(weight, torch.zeros(64, 64), 4, 32).dequantize()).all()


@pytest.mark.parametrize(("bits", "upper", "rows"), [(4, 3, 100), (3, 3, 64), (6, 4, 70)])
def test_outputs_are_closer_where_every_column_has_scales_of_its_own(bits, upper, rows):
    x, weight = inputs(96), torch.randn(rows, 96, generator=torch.Generator().manual_seed(1))
    errors = []
    compensated = compensated_columns(weight, x.T @ x, bits, 64, upper=upper)
    for codes in (compensated, nearest_codes(weight.T, bits, 64, upper=upper)):
        made = NestedRows.of(*codes, bits, upper, rows)
        found = (made.coarse() + made.correction()).T
        errors.append((x @ (found - weight).T).square().sum())
    assert errors[0] < 0.75 * errors[1]


def test_the_scales_serve_both_planes():
    x, weight = inputs(128), torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    errors = {}
    for upper in (3, None):
        codes, scales = compensated_codes(weight, x.T @ x, 4, 64, upper=upper)
        made = NestedMatrix.of(codes, scales, 4, 3, 128)
        errors[upper] = [
            float((x @ (m - weight).T).square().sum()) for m in (made.dequantize(), made.upper.dequantize())
        ]
    assert errors[3][1] < errors[None][1]
    assert errors[3][0] < 1.3 * errors[None][0]
