"""The report of a comparison: points, table, figures, and a page that needs nothing else."""

from __future__ import annotations

import base64
import csv
import html
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lte.report.figures import tradeoff_figure
from lte.report.studies import METRICS, Row, Spread, harness_of, loss_of, markdown_table, read_records, rows_of

AXES = {"sparsity": "FFN sparsity (%)", "gflops": "GFLOPs per token", "megabytes": "MB read per token"}
"""What quality is drawn over, and how it is called."""

COLUMNS = (
    "method",
    "target_sparsity",
    "seed",
    "steps",
    "metric",
    "value",
    "loss",
    "sparsity",
    "linear_sparsity",
    "gflops_per_token",
    "mbytes_per_token",
    "decode_ms_per_token",
    "decode_ms_dense",
    "decode_ms_transformers",
    "decode_path",
    "seconds",
    "version",
)

FEWEST = (
    "Fewest GFLOPs and MB per token within a loss (nats) above the dense model's, on straight lines between points, "
    "the first of which is the dense model with what decides; - where a method loses more, or takes no less than the "
    "dense model."
)

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-size: .9rem; } .wide { overflow-x: auto; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
img { max-width: 100%; height: auto; }
code { background: #f3f3f3; padding: .1rem .3rem; overflow-wrap: anywhere; }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd; } code { background: #2a2a2a; }
th, td { border-color: #444; } th:first-child, td:first-child { background: #181818; } img { background: #fff; } }
"""


def write_report(out: Path) -> Path:
    """Write ``points.csv``, ``table.md``, figures and ``report.html`` from ``out/points``; the page.

    Where no point is done yet, the page says so.
    """
    records = read_records(out / "points")
    rows = rows_of(records)
    with (out / "points.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        others = [_more(record) for record in records]
        names = list(dict.fromkeys(name for each in others for name in each))
        writer.writerow([*COLUMNS, *names])
        writer.writerows(
            [*_csv_row(record), *map(each.get, names)] for record, each in zip(records, others, strict=True)
        )
    head, body = points_table(rows)
    less = fewest_table(rows)
    table = markdown_table(head, body)
    if any(line[1].endswith("*") for line in body):
        table += f"\n{OFF_TARGET_NOTE}\n"
    (out / "table.md").write_text(table + (f"\n{FEWEST}\n\n{markdown_table(*less)}" if less[1] else ""))
    figures = []
    for axis, name in AXES.items() if rows else ():
        figures.append((out / f"by-{axis}.png", name))
        tradeoff_figure(rows, "", figures[-1][0], over=axis, name=name)
    page = out / "report.html"
    page.write_text(_page(out, (head, body), less, figures, records))
    return page


def _csv_row(record: dict[str, Any]) -> list[Any]:
    decode = record.get("decode", {})
    return [
        record["series"],
        record["target_sparsity"],
        record["settings"].get("seed", 0),
        record["steps"],
        record["metric"],
        record["value"],
        loss_of(record),
        record["sparsity"],
        record["linear_sparsity"],
        record["gflops_per_token"]["sparse"],
        record["bytes_per_token"]["sparse"] / 1e6,
        *(decode.get(key) for key in ("ms_per_token", "kernels_dense_ms_per_token", "dense_ms_per_token", "path")),
        record["training"]["seconds"],
        record["versions"].get("commit", record["versions"]["lte"]),
    ]


def _more(record: dict[str, Any]) -> dict[str, Any]:
    """Other metrics of the task, and tasks of lm-evaluation-harness."""
    return {key: value for key, value in record["extras"].items() if key in METRICS} | harness_of(record)


def points_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Methods by loss within each target, the dense model first."""
    dense = next((row for row in rows if row.series == "dense"), None)
    timed = any(row.decode_ms is not None for row in rows)
    found = [_qualities(row) for row in rows]
    qualities = list(dict.fromkeys(name for each in found for name in each)) or ["loss (nats)"]
    head = ["method", "target", *qualities, "above dense", "FFN sparsity %", "linear %", "GFLOPs/token", "MB/token"]
    head += ["ms/token", "x dense", "path"] if timed else []
    head += ["kernels", "seeds"]
    body = []
    for row in sorted(rows, key=lambda row: (row.series != "dense", row.target or 0.0, row.loss.mean)):
        above = "-" if dense is None or row is dense else f"{row.loss.mean - dense.loss.mean:+.3f}"
        mine = _qualities(row)
        values = [mine[name].text(".3f") if name in mine else "-" for name in qualities]
        costs = [row.sparsity.text(".1f"), _text(row.linear, ".1f"), _text(row.gflops, ".4g")]
        costs += [_text(row.megabytes, ".4g")]
        if timed:
            costs += [_text(row.decode_ms, ".2f"), _text(row.decode_gain, ".2f"), row.path]
        missed = row.target is not None and abs(row.sparsity.mean / 100 - row.target) > OFF_TARGET
        target = "-" if row.target is None else f"{row.target:g}{'*' if missed else ''}"
        body.append([row.series, target, *values, above, *costs, row.kernel, str(row.seeds)])
    return head, body


def _qualities(row: Row) -> dict[str, Spread]:
    main, *rest = row.qualities.items()
    return dict([main, *row.others.items(), *rest])


OFF_TARGET = 0.03
"""How far a sparsity is from its target where the table says so; experts of a few neurons do not divide finer."""

OFF_TARGET_NOTE = "\\* more than 3 points off its target."

WITHIN = (0.02, 0.05, 0.1, 0.2, 0.5)
"""Losses above the dense model's, in nats, within which the fewest GFLOPs are asked for."""


def fewest(rows: Sequence[Row], dense: Row, allowed: float, cost: str) -> float | None:
    """The least a method takes while it loses no more than is allowed; None where none of its points is as good.

    Between points losses are taken to lie on a straight line; the first is the dense model with what decides.

    Args:
        rows: of one method.
        dense: of the dense model.
        allowed: nats above it.
        cost: ``gflops`` or ``megabytes`` of the rows.
    """
    of_dense = getattr(dense, cost).mean
    points = [(0.0, of_dense + (rows[0].deciding.get(cost, 0.0) if rows else 0.0))]
    points += [(row.loss.mean - dense.loss.mean, getattr(row, cost).mean) for row in rows]
    points.sort(key=lambda point: -point[1])
    best = None
    for (above, size), (next_above, next_size) in itertools.pairwise(points):
        if next_above <= allowed:
            best = next_size
        elif above <= allowed:
            best = min(size, size + (allowed - above) / (next_above - above) * (next_size - size))
    return best if best is None or best < of_dense else None


def fewest_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Methods by GFLOPs at the middle loss; empty where there is no dense model beside them."""
    dense = next((row for row in rows if row.series == "dense"), None)
    head = ["method", *(f"GFLOPs, +{allowed:g}" for allowed in WITHIN), *(f"MB, +{allowed:g}" for allowed in WITHIN)]
    if dense is None or dense.gflops is None or dense.megabytes is None:
        return head, []
    found = []
    for name in dict.fromkeys(row.series for row in rows if row is not dense):
        mine = [row for row in rows if row.series == name]
        costs = [fewest(mine, dense, allowed, kind) for kind in ("gflops", "megabytes") for allowed in WITHIN]
        found.append((costs[len(WITHIN) // 2] or float("inf"), name, costs))
    body = [[name, *("-" if cost is None else f"{cost:.4g}" for cost in costs)] for _, name, costs in sorted(found)]
    of_dense = [[f"{getattr(dense, kind).mean:.4g}"] * len(WITHIN) for kind in ("gflops", "megabytes")]
    return head, [["dense", *of_dense[0], *of_dense[1]], *body]


def _text(spread: Spread | None, form: str) -> str:
    return "-" if spread is None else format(spread.mean, form)


def _page(
    out: Path,
    table: tuple[list[str], list[list[str]]],
    less: tuple[list[str], list[list[str]]],
    figures: list[tuple[Path, str]],
    records: list[dict[str, Any]],
) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    def drawn_table(head: list[str], body: list[list[str]]) -> str:
        rows = "".join([line(head, "th"), *(line(cells, "td") for cells in body)])
        return f'<div class="wide"><table>{rows}</table></div>'

    cheapest = f"<h2>Least cost within a loss</h2><p>{html.escape(FEWEST)}</p>{drawn_table(*less)}" if less[1] else ""
    drawn = "".join(
        f'<h2>By {html.escape(name)}</h2><img alt="quality over {html.escape(name)}" '
        f'src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}">'
        for file, name in figures
    )
    about = ""
    if records:
        last = records[-1]
        model = html.escape(
            str(next((r["training"]["recipe"]["model"] for r in records if r["series"] == "dense"), ""))
        )
        about = (
            f"<p>Model <code>{model}</code>, evaluated on <code>{html.escape(last['data'])}</code>, "
            f"{last['tokens']:,} tokens. {html.escape(', '.join(f'{k} {v}' for k, v in last['versions'].items()))}.</p>"
        )
    note = "" if records else "<p>No point is done yet.</p>"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>lte compare</title><style>{STYLE}</style></head>'
        f"<body><h1>Sparsity methods compared</h1>{about}{note}{drawn_table(*table)}"
        "<p>FFN sparsity is of the FFNs' weights, linear % of all linear layers', as some papers count. GFLOPs "
        "(2<sup>30</sup>) and MB count what decides, too; oracles are not charged for what they look at. ms/token: "
        "decoding alone in bfloat16; x dense: how much faster than the dense model through the same kernels, measured "
        "beside it, whose own line says what those bring over transformers; kernels: what they can do with the method. "
        "*: more than 3 points off its target. "
        f"Every point is a JSON in <code>points/</code>.</p>{cheapest}{drawn}</body></html>\n"
    )
