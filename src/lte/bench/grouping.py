"""Balanced k-means: time on a large layer, and cost against an exact-assignment reference on a small one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lte.grouping.kmeans import balanced_kmeans, clustering_cost, normalise_rows

LARGE = (11008, 4096, 32)
SMALL = (768, 256, 32)
"""Rows, width and cluster size; the large one is the gate of LLaMA-7B."""


def bench_grouping(*, seeds: Sequence[int] = (0, 1, 2)) -> list[dict[str, Any]]:
    """Rows with wall and CPU seconds, the cost, and its ratio to that of the package ``k-means-constrained``.

    The ratio is None on the large layer, which the reference does not finish in reasonable time.
    """
    rows = [_measure("random", _features("random", LARGE, 0), LARGE, 0, reference=False)]
    for kind in ("random", "planted"):
        rows += [_measure(kind, _features(kind, SMALL, seed), SMALL, seed, reference=True) for seed in seeds]
    return rows


def _features(kind: str, shape: tuple[int, int, int], seed: int) -> Tensor:
    n, width, size = shape
    generator = torch.Generator().manual_seed(seed)
    noise_ND = torch.randn(n, width, generator=generator)
    if kind == "random":
        return normalise_rows(noise_ND)
    centres = torch.randn(n // size, width, generator=generator)
    return normalise_rows(centres[torch.randint(n // size, (n,), generator=generator)] + noise_ND)


def _measure(
    kind: str, features_ND: Tensor, shape: tuple[int, int, int], seed: int, *, reference: bool
) -> dict[str, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    labels_N = balanced_kmeans(features_ND, shape[2], seed=seed)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    cost = clustering_cost(features_ND, labels_N)
    return {
        "features": kind,
        "rows x width": f"{shape[0]} x {shape[1]}",
        "clusters": shape[0] // shape[2],
        "seed": seed,
        "seconds": wall,
        "cpu_seconds": cpu,
        "cost": cost,
        "cost_ratio": cost / _reference_cost(features_ND, shape, seed) if reference else None,
        "threads": torch.get_num_threads(),
    }


def _reference_cost(features_ND: Tensor, shape: tuple[int, int, int], seed: int) -> float:
    from k_means_constrained import KMeansConstrained

    n, _, size = shape
    model = KMeansConstrained(n_clusters=n // size, size_min=size, size_max=size, random_state=seed)
    fitted = model.fit(features_ND.numpy())
    return clustering_cost(features_ND, torch.tensor(fitted.labels_.tolist()))
