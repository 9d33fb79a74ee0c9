import pytest

from lte.report.studies import Row, Spread, interpolated

LOSS = "loss (nats)"


def row(sparsity, value, loss, metric="perplexity"):
    one = {"series": "paper", "setting": "", "seeds": 1, "metric": metric, "layers": []}
    return Row(**one, sparsity=Spread(sparsity, 0), value=Spread(value, 0), loss=Spread(loss, 0))


def test_between_two_runs_the_line_between_them():
    rows = [row(20, 0.9, 1.0), row(40, 0.8, 2.0), row(80, 0.4, 6.0)]
    assert interpolated(rows, 30, LOSS) == pytest.approx(1.5)
    assert interpolated(rows, 40, LOSS) == pytest.approx(2.0)
    by_metric = [row(20, 0.9, 1.0, "accuracy"), row(40, 0.8, 2.0, "accuracy"), row(80, 0.4, 6.0, "accuracy")]
    assert interpolated(by_metric, 50, "accuracy") == pytest.approx(0.7)
    assert interpolated(by_metric, 50, LOSS) == pytest.approx(3.0)


def test_outside_the_runs_nothing():
    rows = [row(20, 0.9, 1.0), row(40, 0.8, 2.0)]
    assert interpolated(rows, 19, LOSS) is None
    assert interpolated(rows, 41, LOSS) is None
    assert interpolated([], 41, LOSS) is None
