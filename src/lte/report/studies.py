"""Points of a study, averaged over seeds: what tables and figures of comparisons are made of."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lte.config import METHODS

METRICS = {
    "perplexity": "perplexity",
    "rougeL": "ROUGE-L",
    "bleu": "BLEU",
    "accuracy": "accuracy",
    "f1": "F1",
    "matthews": "Matthews",
    "pearson": "Pearson",
    "spearman": "Spearman",
}


HALF = ("cats", "countdown", "relufication")
"""Methods that decide by a matrix of the FFN itself, which takes 16 bits a weight where the FFN does."""


@dataclass(frozen=True)
class Spread:
    """Mean of some runs, and their standard deviation; 0 for a single one."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """From one value per seed."""
        return cls(mean(values), stdev(values) if len(values) > 1 else 0.0)

    def text(self, form: str = ".3f") -> str:
        """``mean ± deviation``."""
        return f"{self.mean:{form}} ± {self.deviation:{form}}" if self.deviation else f"{self.mean:{form}}"


@dataclass(frozen=True)
class Row:
    """One setting of a study.

    Attributes:
        series: name of its series.
        setting: what its series' grid gave it, without the seed.
        seeds: how many runs it is the mean of.
        sparsity: in percent.
        value: of the metric.
        loss: in nats, where the task has one.
        layers: sparsity of each layer, in percent.
        read: bytes of the FFNs that a token reads, the router's too, in percent of the dense ones' at 16 bits a weight;
            None where the records do not say.
        target: sparsity asked for, where one was.
        gflops, megabytes: per token, what decides included; None where the records do not say.
        linear: sparsity of all linear layers, in percent.
        decode_ms: to decode one token; decode_gain: how much faster that is than the dense model through the same
            kernels, or those than transformers.
        path: what decoded.
        tasks: of lm-evaluation-harness: name and metric -> value.
        others: the task's other metrics: name -> value.
        kernel: what kernels do with the method, in words.
        deciding: GFLOPs and MB that deciding takes where nothing is left out yet.
    """

    series: str
    setting: str
    seeds: int
    metric: str
    sparsity: Spread
    value: Spread
    loss: Spread
    layers: list[float]
    read: float | None = None
    target: float | None = None
    gflops: Spread | None = None
    megabytes: Spread | None = None
    linear: Spread | None = None
    decode_ms: Spread | None = None
    decode_gain: Spread | None = None
    path: str = "-"
    tasks: dict[str, Spread] = field(default_factory=dict)
    others: dict[str, Spread] = field(default_factory=dict)
    kernel: str = "-"
    deciding: dict[str, float] = field(default_factory=dict)

    @property
    def qualities(self) -> dict[str, Spread]:
        """What is compared, by name: the metric and the loss, which are one where the metric is its exponential."""
        of_metric = {} if self.metric == METRICS["perplexity"] else {self.metric: self.value}
        return {**of_metric, "loss (nats)": self.loss, **self.tasks}


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The study's points, by name."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def read_rows(folder: Path) -> list[Row]:
    """The study's settings, by series and sparsity."""
    return rows_of(read_records(folder))


def rows_of(points: list[dict[str, Any]]) -> list[Row]:
    """Settings of some points, by series and sparsity."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in points:
        setting = ", ".join(
            f"{key.rpartition('.')[2]} {value}" for key, value in record["settings"].items() if key != "seed"
        )
        groups.setdefault((record["series"], setting), []).append(record)
    found = [_row(series, setting, records) for (series, setting), records in groups.items()]
    return sorted(found, key=lambda row: (row.series != "dense", row.series, row.sparsity.mean))


def interpolated(rows: Sequence[Row], sparsity: float, quality: str) -> float | None:
    """What a series reaches at a sparsity between two of its settings, on the line between them; None outside.

    Args:
        rows: the series, by sparsity.
        sparsity: in percent.
        quality: one of :attr:`Row.qualities`.
    """
    for low, high in itertools.pairwise(rows):
        if low.sparsity.mean <= sparsity <= high.sparsity.mean:
            share = (sparsity - low.sparsity.mean) / max(high.sparsity.mean - low.sparsity.mean, 1e-9)
            left, right = low.qualities[quality].mean, high.qualities[quality].mean
            return left + share * (right - left)
    return None


def _row(series: str, setting: str, records: list[dict[str, Any]]) -> Row:
    layers = zip(*(record["sparsity_per_layer"] for record in records), strict=True)
    return Row(
        series=series,
        setting=setting,
        seeds=len(records),
        metric=METRICS[records[0]["metric"]],
        sparsity=Spread.of([100 * record["sparsity"] for record in records]),
        value=Spread.of([record["value"] for record in records]),
        loss=Spread.of([loss_of(record) for record in records]),
        layers=[100 * mean(values) for values in layers],
        read=_mean_share(records),
        target=records[0]["settings"].get("training.target_sparsity"),
        gflops=_spread(records, lambda record: record["gflops_per_token"]["sparse"]),
        megabytes=_spread(records, lambda record: record["bytes_per_token"]["sparse"] / 1e6),
        linear=_spread(records, lambda record: 100 * record["linear_sparsity"]),
        decode_ms=_spread(records, _decode_ms),
        decode_gain=_spread(records, _decode_gain),
        path=records[0].get("decode", {}).get("path", "-"),
        tasks={name: Spread.of([harness_of(record)[name] for record in records]) for name in harness_of(records[0])},
        others={
            METRICS[key]: Spread.of([record["extras"][key] for record in records])
            for key in records[0]["extras"]
            if key in METRICS
        },
        kernel=_kernel(records[0]),
        deciding=_deciding(records[0]),
    )


def harness_of(record: dict[str, Any]) -> dict[str, float]:
    """Tasks of lm-evaluation-harness, by name and metric."""
    return {f"{name} {task['metric']}": task["value"] for name, task in record.get("tasks", {}).items()}


def _kernel(record: dict[str, Any]) -> str:
    known = METHODS.get(record.get("method", ""))  # a plug-in may not be there any more
    if known is None:
        return "-"
    settings, method = known
    given = record.get("training", {}).get("recipe", {}).get("sparsity", {})
    return method(settings(**{key: value for key, value in given.items() if key in settings.model_fields})).kernels


def _deciding(record: dict[str, Any]) -> dict[str, float]:
    if record.get("method") in HALF:  # by a part of the FFN, which has then been computed
        return {}
    sizes = {"gflops": ("gflops_per_token", 1.0), "megabytes": ("bytes_per_token", 1e6)}
    return {cost: record[key].get("router", 0.0) / unit for cost, (key, unit) in sizes.items() if key in record}


def _decode_ms(record: dict[str, Any]) -> float:
    decode = record["decode"]
    ms: float = decode.get("ms_per_token", decode["kernels_dense_ms_per_token"])
    return ms


def _decode_gain(record: dict[str, Any]) -> float:
    decode = record["decode"]
    against = "kernels_dense_ms_per_token" if "ms_per_token" in decode else "dense_ms_per_token"
    gain: float = decode[against] / _decode_ms(record)
    return gain


def _spread(records: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> Spread | None:
    """Of a value that older records may lack; None then."""
    try:
        return Spread.of([value(record) for record in records])
    except KeyError:
        return None


def _mean_share(records: list[dict[str, Any]]) -> float | None:
    shares = [share for record in records if (share := bytes_read(record)) is not None]
    return 100 * mean(shares) if len(shares) == len(records) else None


def loss_of(record: dict[str, Any]) -> Any:
    """The loss of a point, in nats; None where the task has none."""
    return record["extras"].get("cross_entropy", record["extras"].get("loss"))


def bytes_read(record: dict[str, Any]) -> float | None:
    """Share of the FFNs' bytes at 16 bits a weight, see :class:`Row`; None where the record does not say.

    Studies run in float32, which is twice what a model's weights take where it is used.
    """
    read, sparsity = record.get("bytes_per_token"), record["sparsity"]
    if read is None or not sparsity:
        return None
    at_16_bits = (read["dense"] + read["router"] - read["sparse"]) / sparsity / 2
    router = read["router"] / 2 if record.get("method") in HALF else read["router"]
    share: float = 1 - sparsity + router / at_16_bits
    return share


def markdown_table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
