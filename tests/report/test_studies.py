import pytest

from lte.report.studies import Row, Spread, interpolated


def row(sparsity, value, loss):
    one = {"series": "paper", "setting": "", "seeds": 1, "metric": "accuracy", "layers": []}
    return Row(**one, sparsity=Spread(sparsity, 0), value=Spread(value, 0), loss=Spread(loss, 0))


def test_between_two_runs_the_line_between_them():
    rows = [row(20, 0.9, 1.0), row(40, 0.8, 2.0), row(80, 0.4, 6.0)]
    assert interpolated(rows, 30, by_loss=True) == pytest.approx(1.5)
    assert interpolated(rows, 50, by_loss=False) == pytest.approx(0.7)
    assert interpolated(rows, 40, by_loss=True) == pytest.approx(2.0)


def test_outside_the_runs_nothing():
    rows = [row(20, 0.9, 1.0), row(40, 0.8, 2.0)]
    assert interpolated(rows, 19, by_loss=True) is None
    assert interpolated(rows, 41, by_loss=True) is None
    assert interpolated([], 41, by_loss=True) is None
