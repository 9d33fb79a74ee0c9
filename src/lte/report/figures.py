"""Figures from numbers; nothing is measured here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


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
