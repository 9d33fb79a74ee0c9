import csv
import json
from dataclasses import replace

import pytest

from lte.report.comparison import fewest, points_table, write_report
from lte.report.studies import Row, Spread, interpolated, read_rows

LOSS = "loss (nats)"


RECORD = {
    "settings": {"seed": 0},
    "metric": "perplexity",
    "value": 9.0,
    "sparsity": 0.5,
    "sparsity_per_layer": [0.5],
    "extras": {"loss": 2.2},
}
"""Of a point, but for what it is of and what it costs."""


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


def test_bytes_read_are_those_at_16_bits(tmp_path):
    """Of 100 bytes 60 are FFNs in float32: 30 at 16 bits, half of which are left out, and the router reads 3."""
    sizes = {"dense": 100, "sparse": 100 - 30 + 3, "router": 3}
    record = {**RECORD, "series": "copy", "bytes_per_token": sizes}
    (tmp_path / "one.json").write_text(json.dumps(record))
    assert read_rows(tmp_path)[0].read == pytest.approx(50 + 10)
    del record["bytes_per_token"]
    (tmp_path / "one.json").write_text(json.dumps(record))
    assert read_rows(tmp_path)[0].read is None


def spread(value):
    return Spread(value, 0.0)


def costed(series, loss, gflops):
    return replace(row(50, 9.0, loss), series=series, gflops=spread(gflops), megabytes=spread(10 * gflops))


def test_fewest_flops_lie_on_the_line_between_points():
    dense = costed("dense", 2.0, 8.0)
    mine = [costed("a", 2.1, 6.0), costed("a", 2.5, 4.0)]
    assert fewest(mine, dense, 0.05, "gflops") == pytest.approx(7.0)
    assert fewest(mine, dense, 0.1, "gflops") == pytest.approx(6.0)
    assert fewest(mine, dense, 0.3, "megabytes") == pytest.approx(50.0)
    assert fewest(mine, dense, 9.0, "gflops") == pytest.approx(4.0)
    better = [costed("b", 1.9, 7.0)]
    assert fewest(better, dense, 0.02, "gflops") == pytest.approx(7.0)
    larger = [costed("c", 2.01, 9.0)]  # a router that costs more than it saves
    assert fewest(larger, dense, 0.05, "gflops") is None


def test_what_decides_is_paid_from_the_first_neuron_left_out():
    """From 8 + 3 at no loss to 6 at a loss of 0.2: half way it takes 8.5, more than the dense model."""
    dense = costed("dense", 2.0, 8.0)
    mine = [replace(costed("copy", 2.2, 6.0), deciding={"gflops": 3.0, "megabytes": 10.0})]
    assert fewest(mine, dense, 0.1, "gflops") is None
    assert fewest(mine, dense, 0.16, "gflops") == pytest.approx(7.0)
    assert fewest(mine, dense, 0.1, "megabytes") == pytest.approx(75.0)
    assert fewest(mine, dense, 0.5, "gflops") == pytest.approx(6.0)


def test_records_say_what_deciding_takes_and_what_kernels_do_with_it(tmp_path):
    record = {
        **RECORD,
        "gflops_per_token": {"dense": 4.0, "sparse": 3.0, "router": 1.0},
        "bytes_per_token": {"dense": 4e6, "sparse": 3e6, "router": 2e6},
    }
    asked = {
        "cats": ("cats", {}),
        "dejavu": ("dejavu", {"rank": 8}),
        "known": ("moefication", {"method": "moefication", "router": "oracle"}),
        "guessed": ("moefication", {}),
        "direct": ("countdown", {"direct": True}),
        "gone": ("a-plug-in", {"size": 3}),
    }
    for series, (method, settings) in asked.items():
        of = {"series": series, "method": method, "training": {"recipe": {"sparsity": settings}}}
        (tmp_path / f"{series}.json").write_text(json.dumps({**record, **of}))
    rows = {row.series: row for row in read_rows(tmp_path)}
    assert rows["cats"].deciding == {}  # the gate is computed once
    assert rows["dejavu"].deciding == {"gflops": 1.0, "megabytes": 2.0}
    kernels = {series: row.kernel for series, row in rows.items()}
    assert kernels == {
        "cats": "go on from there, if the FFN is gated",
        "dejavu": "run its mask",
        "known": "none, an oracle",
        "guessed": "run its mask",
        "direct": "none, an oracle",
        "gone": "-",
    }


def test_a_missed_target_is_marked():
    near, far = replace(row(52, 9.0, 1.0), target=0.5), replace(row(50, 9.0, 1.0), target=0.2)
    _, body = points_table([near, far])
    assert sorted(line[1] for line in body) == ["0.2*", "0.5"]


def test_a_task_that_only_some_points_have_keeps_its_column():
    one = row(50, 9.0, 1.0)
    head, body = points_table([one, replace(one, series="other", tasks={"mmlu acc": spread(0.25)})])
    assert all(len(line) == len(head) for line in body)
    at = head.index("mmlu acc")
    assert sorted(line[at] for line in body) == ["-", "0.250"]


def test_what_only_some_points_have_is_drawn_and_written(tmp_path):
    record = {
        "method": "kla",
        "settings": {"seed": 0},
        "steps": 0,
        "metric": "rougeL",
        "value": 0.5,
        "sparsity": 0.5,
        "sparsity_per_layer": [0.5],
        "linear_sparsity": 0.4,
        "gflops_per_token": {"dense": 2.0, "sparse": 1.0, "router": 0.0},
        "bytes_per_token": {"dense": 2e6, "sparse": 1e6, "router": 0.0},
        "extras": {"cross_entropy": 1.0, "bleu": 0.25},
        "training": {"seconds": 1.0, "recipe": {"model": "m"}},
        "versions": {"lte": "1"},
        "target_sparsity": 0.5,
        "data": "text.txt",
        "tokens": 1,
    }
    (tmp_path / "points").mkdir()
    task = {"tasks": {"mmlu": {"metric": "acc", "value": 0.75}}}
    for number, (series, more) in enumerate((("dense", {}), ("kla", task), ("other", {}))):
        (tmp_path / "points" / f"{number}.json").write_text(json.dumps({**record, "series": series, **more}))
    assert "0.750" in write_report(tmp_path).read_text()
    head, *body = csv.reader((tmp_path / "points.csv").open())
    found = {line[0]: dict(zip(head, line, strict=True)) for line in body}
    assert found["kla"]["bleu"] == "0.25"
    assert [found[name]["mmlu acc"] for name in ("dense", "kla", "other")] == ["", "0.75", ""]
    table = (tmp_path / "table.md").read_text()
    assert "BLEU" in table
    assert "none, an oracle" in table
