"""Figures from numbers; nothing is measured here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cycler import cycler
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lte.report.studies import Row

COLOURS = colormaps["tab10"].colors  # type: ignore[attr-defined]
"""Of series; markers tell those of one colour apart."""

SHOWN = 1.5
"""Nats above the dense model's loss from which a figure does not show it: others could not be told apart."""

MANY = 8
"""More series than this have their legend below the panels."""


def sparsity_figure(
    sparsity_per_layer: Sequence[float], histogram: Sequence[Sequence[float]], threshold: float, file: Path
) -> None:
    """Two panels: share of neurons not used in each layer, and where the routers' scores lie.

    Args:
        sparsity_per_layer: L values in [0, 1].
        histogram: [L][bins] counts of scores over (0, 1).
        threshold: drawn as a line.
        file: the PNG to write.
    """
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    layers = range(len(sparsity_per_layer))
    left.bar(layers, [100 * value for value in sparsity_per_layer], color="#4472a8")
    left.set(
        xlabel="layer",
        ylabel="FFN sparsity (%)",
        ylim=(0, 100),
        xticks=list(layers),
        title="Neurons not used",
    )
    bins = len(histogram[0])
    centres = [(i + 0.5) / bins for i in range(bins)]
    for layer, counts in enumerate(histogram):
        total = sum(counts) or 1.0
        right.plot(centres, [100 * count / total for count in counts], label=f"layer {layer}", linewidth=1.2)
    right.axvline(threshold, color="black", linestyle="--", linewidth=0.8, label="threshold")
    right.set(xlabel="router score", ylabel="share of scores (%)", yscale="log", title="Router scores")
    right.legend(fontsize=7)
    figure.savefig(file, dpi=130)


def tradeoff_figure(
    rows: Sequence[Row], title: str, file: Path, *, over: str = "sparsity", name: str = "FFN sparsity (%)"
) -> None:
    """Quality over cost: a panel per measure of quality, a line per series, bars of one standard deviation.

    Args:
        rows: of :func:`lte.report.studies.read_rows`; a series called ``dense`` becomes a horizontal band.
        title: of the figure.
        file: the PNG to write.
        over: ``sparsity``, ``gflops`` or ``megabytes`` of the rows; those that do not have it are left out.
        name: of that.
    """
    rows = [row for row in rows if getattr(row, over) is not None]
    names = list(dict.fromkeys(name for row in rows for name in row.qualities))
    many = len({row.series for row in rows}) > MANY
    figure = Figure(figsize=(5.6 * len(names), 5.4 if many else 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for quality, axes in zip(names, panels, strict=True):
        _tradeoff(axes, rows, quality, over)
        axes.set_xlabel(name)
    known: dict[str, Any] = {}
    for axes in panels:
        lines, labels = axes.get_legend_handles_labels()
        known |= dict(zip(labels, lines, strict=True))
    labels, lines = list(known), list(known.values())
    if many:
        figure.legend(lines, labels, fontsize=8, loc="outside lower center", ncols=2 + len(names))
    else:
        panels[0].legend(lines, labels, fontsize=8)
    figure.suptitle(title)
    figure.savefig(file, dpi=130)


def _tradeoff(axes: Axes, rows: Sequence[Row], name: str, over: str) -> None:
    axes.set_prop_cycle(cycler(marker=["o", "s", "^"]) * cycler(color=COLOURS))
    for series in dict.fromkeys(row.series for row in rows):
        mine = [row for row in rows if row.series == series and name in row.qualities]
        values = [row.qualities[name] for row in mine]
        if series == "dense":
            for middle, spread in ((value.mean, value.deviation) for value in values):
                axes.axhline(middle, color="black", linestyle="--", linewidth=0.9, label="dense, as many steps")
                axes.axhspan(middle - spread, middle + spread, color="black", alpha=0.08, linewidth=0)
            continue
        axes.errorbar(
            [getattr(row, over).mean for row in mine],
            [value.mean for value in values],
            xerr=[getattr(row, over).deviation for row in mine],
            yerr=[value.deviation for value in values],
            markersize=4,
            capsize=2,
            linewidth=1.2,
            label=series,
        )
    axes.set(ylabel=name)
    axes.grid(alpha=0.3)
    dense = next((row for row in rows if row.series == "dense"), None)
    if name == "loss (nats)" and dense is not None and max(row.loss.mean for row in rows) > dense.loss.mean + SHOWN:
        low = min(row.loss.mean for row in rows)
        axes.set_ylim(low - 0.05 * SHOWN, dense.loss.mean + SHOWN)
        axes.set_title(f"up to {SHOWN:g} nats above dense", fontsize=9)


def settings_figure(rows: Sequence[Row], title: str, file: Path) -> None:
    """One dot per setting, with its standard deviation over seeds, and the sparsity it was measured at.

    Args:
        rows: of :func:`lte.report.studies.read_rows`.
        title: of the figure.
        file: the PNG to write.
    """
    figure = Figure(figsize=(6.4, 0.9 + 0.32 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    heights = range(len(rows), 0, -1)
    axes.errorbar(
        [row.loss.mean for row in rows],
        list(heights),
        xerr=[row.loss.deviation for row in rows],
        fmt="o",
        markersize=5,
        capsize=2,
        color="#4472a8",
    )
    names = [" ".join(part for part in (row.series, row.setting) if part) for row in rows]
    axes.set_yticks(
        list(heights),
        [f"{name} ({row.sparsity.mean:.0f} %)" for name, row in zip(names, rows, strict=True)],
        fontsize=8,
    )
    axes.set(xlabel="loss (nats)", title=title)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=130)


def scores_figure(histograms: Mapping[str, Sequence[Sequence[float]]], file: Path) -> None:
    """Where the scores of different routers lie, over all layers.

    Args:
        histograms: name -> [L][bins] counts of scores over (0, 1).
        file: the PNG to write.
    """
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, layers in histograms.items():
        counts = [sum(column) for column in zip(*layers, strict=True)]
        centres = [(i + 0.5) / len(counts) for i in range(len(counts))]
        axes.plot(centres, [100 * count / sum(counts) for count in counts], marker="o", markersize=3, label=name)
    axes.set(xlabel="router score", ylabel="share of scores (%)", yscale="log", title="Scores after training")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=130)


def front_figure(rows: Sequence[Mapping[str, Any]], title: str, file: Path) -> None:
    """Loss against bits read and against time, of ours and of llama.cpp's formats.

    Args:
        rows: of ``lte bench front``.
        title: of the figure.
        file: the PNG to write.
    """
    figure = Figure(figsize=(9.5, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    done = [row for row in rows if row["status"] == "ok" and row["weights"] != "bf16"]
    for axes, key, label in zip(
        panels, ("bits_per_weight", "ms_per_token"), ("bits of all weights a token reads", "ms a token"), strict=True
    ):
        for engine, steps, mark in (("lte", False, "o"), ("lte", True, "*"), ("llama.cpp", False, "s")):
            of = [row for row in done if row["engine"] == engine and bool(row["steps"]) == steps]
            of.sort(key=lambda row: row["bits_per_weight"])
            if of:
                name = engine + (", scales trained" if steps else "")
                axes.plot([r[key] for r in of], [r["above_dense"] for r in of], marker=mark, label=name, linewidth=1)
                for row in of:
                    axes.annotate(
                        row["weights"],
                        (row[key], row["above_dense"]),
                        fontsize=6,
                        xytext=(3, 3),
                        textcoords="offset points",
                    )
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="nats above 16 bits", title=title)
    panels[0].legend(fontsize=8)
    figure.savefig(file, dpi=130)
