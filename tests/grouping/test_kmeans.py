from __future__ import annotations

import numpy as np
import pytest
import torch
from k_means_constrained import KMeansConstrained

from lte.bench import grouping as bench
from lte.errors import ConfigError
from lte.grouping import balanced_kmeans, kmeans
from lte.grouping.kmeans import clustering_cost, normalise_rows


def features(kind: str, n: int = 768, width: int = 256, clusters: int = 24, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, width, generator=generator)
    if kind == "random":
        return normalise_rows(noise)
    centres = torch.randn(clusters, width, generator=generator)
    labels = torch.arange(n) % clusters
    if kind == "unbalanced":
        labels = torch.randint(clusters - 9, (n,), generator=generator)
    return normalise_rows(centres[labels] + 0.8 * noise)


@pytest.mark.parametrize("kind", ["random", "planted", "unbalanced"])
def test_cost_against_exact_assignment(kind):
    """At most 1.02 times the cost of a k-means whose assignment step is solved exactly."""
    n, width, clusters = (768, 256, 24) if kind == "random" else (384, 128, 12)
    x = features(kind, n, width, clusters)
    reference = KMeansConstrained(n_clusters=clusters, size_min=32, size_max=32, random_state=0).fit(x.numpy())
    ours = clustering_cost(x, balanced_kmeans(x, 32, seed=0))
    assert ours <= 1.02 * clustering_cost(x, torch.tensor(reference.labels_.tolist()))


def test_clusters_are_exactly_equal_and_planted_ones_are_found():
    labels = balanced_kmeans(features("planted"), 32, seed=0, effort=3)
    assert torch.bincount(labels).tolist() == [32] * 24
    for cluster in range(24):
        assert len(set((torch.arange(768)[labels == cluster] % 24).tolist())) == 1


def test_the_seed_decides_alone():
    x = features("random", n=128, width=16)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            torch.manual_seed(count)
            found.append(balanced_kmeans(x, 8, seed=3))
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], balanced_kmeans(x, 8, seed=4))


def test_the_global_random_state_is_left_alone():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    balanced_kmeans(features("random", n=64, width=16), 8, seed=0)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state[1])


def test_threads_do_not_matter_where_the_gram_matrix_is_split_over_them():
    x, before = features("random", n=512, width=333), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(balanced_kmeans(x, 32, seed=0, effort=0))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize(("n", "size", "kind"), [(600, 8, "planted"), (780, 20, "unbalanced"), (1000, 20, "random")])
def test_parts_cost_little_more_than_the_whole(monkeypatch, n, size, kind):
    x = features(kind, n, 128, n // size)
    whole = clustering_cost(x, balanced_kmeans(x, size, seed=0, effort=0))
    monkeypatch.setattr(kmeans, "_PART_ROWS", 400)
    monkeypatch.setattr(kmeans, "_cluster_part", note_sizes := NoteSizes())
    labels = balanced_kmeans(x, size, seed=0, effort=0)
    assert sum(note_sizes.rows) == n
    assert max(note_sizes.rows) <= 400
    assert torch.bincount(labels).tolist() == [size] * (n // size)
    assert clustering_cost(x, labels) <= 1.03 * whole


class NoteSizes:
    """Clusters a part and keeps how many rows it had."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.cluster = kmeans._cluster_part

    def __call__(self, features_ND, size, effort, rng):
        self.rows.append(len(features_ND))
        return self.cluster(features_ND, size, effort, rng)


def test_parts_depend_on_the_seed_alone(monkeypatch):
    monkeypatch.setattr(kmeans, "_PART_ROWS", 256)
    x, before = features("random", n=600, width=64), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(balanced_kmeans(x, 8, seed=0, effort=0))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    assert torch.equal(found[0], balanced_kmeans(x * 2.0**40, 8, seed=0, effort=0))
    assert not torch.equal(found[0], balanced_kmeans(x, 8, seed=1, effort=0))


@pytest.mark.parametrize("x", [torch.ones(96, 8), torch.zeros(96, 8)], ids=["equal-rows", "zero-rows"])
@pytest.mark.parametrize("size", [2, 48])
def test_parts_of_degenerate_rows_and_of_one_cluster(monkeypatch, x, size):
    monkeypatch.setattr(kmeans, "_PART_ROWS", 16)
    assert torch.bincount(balanced_kmeans(x, size, seed=0)).tolist() == [size] * (96 // size)


@pytest.mark.parametrize(("n", "size"), [(84, 12), (60, 20), (64, 2), (30, 15)])
def test_odd_and_even_numbers_of_clusters(n, size):
    labels = balanced_kmeans(features("random", n=n, width=16), size, seed=0, effort=1)
    assert torch.bincount(labels).tolist() == [size] * (n // size)


def test_result_does_not_depend_on_origin_and_scale():
    x = features("random", n=64, width=16)
    labels = balanced_kmeans(x, 8, seed=0)
    # A power of two changes no mantissa, so not one bit of the result; a shift changes roundings.
    assert torch.equal(labels, balanced_kmeans(x * 2.0**40, 8, seed=0))
    moved = balanced_kmeans(x + 4.0, 8, seed=0)
    assert clustering_cost(x, moved) == pytest.approx(clustering_cost(x, labels), rel=0.02)


def test_copies_of_a_row_share_a_cluster():
    x = features("random", n=8, width=32).repeat_interleave(8, dim=0)
    assert clustering_cost(x, balanced_kmeans(x, 8, seed=0)) == pytest.approx(0, abs=1e-6)


def test_zero_rows_are_normalised_safely_even_where_the_mean_is_zero():
    x = features("random", n=64, width=32)
    x[:8] = 0
    x[32:] = -x[:32]
    x = normalise_rows(x)
    assert x.isfinite().all()
    assert x[:8].abs().max() == 0
    assert torch.bincount(balanced_kmeans(x, 8, seed=0)).tolist() == [8] * 8


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_rows_of_any_magnitude_are_normalised(scale):
    assert torch.allclose(normalise_rows(features("random", n=5, width=7) * scale).norm(dim=1), torch.ones(5))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_features_on_a_gpu_give_labels_there():
    labels = balanced_kmeans(features("planted", n=96, width=32, clusters=6).cuda(), 16, seed=0)
    assert labels.is_cuda
    assert torch.bincount(labels).tolist() == [16] * 6


@pytest.mark.parametrize(("size", "clusters"), [(1, 16), (16, 1), (2, 8)])
def test_extreme_sizes(size, clusters):
    labels = balanced_kmeans(features("random", n=16, width=4), size, seed=0)
    assert torch.bincount(labels).tolist() == [size] * clusters


@pytest.mark.parametrize("x", [torch.ones(32, 8), torch.zeros(32, 8)], ids=["equal-rows", "zero-rows"])
def test_degenerate_rows(x):
    assert torch.bincount(balanced_kmeans(normalise_rows(x), 8, seed=0)).tolist() == [8] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    labels = balanced_kmeans(normalise_rows(features("planted", n=96, width=32, clusters=6).to(dtype)), 16, seed=0)
    assert torch.bincount(labels).tolist() == [16] * 6


def test_nan_names_the_row():
    x = features("random", n=16, width=4)
    x[5, 0] = float("nan")
    with pytest.raises(ConfigError, match=r"hold NaN or infinity for 1 of 16 neurons \(first: neuron 5\)"):
        balanced_kmeans(x, 4, seed=0)


def test_infinity_is_refused_too():
    x = features("random", n=16, width=4)
    x[5, 2] = x[9, 0] = float("inf")
    with pytest.raises(ConfigError, match=r"rows hold NaN or infinity for 2 of 16 neurons \(first: neuron 5\)"):
        balanced_kmeans(x, 4, seed=0, name="rows")


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (8,)])
def test_what_is_not_a_matrix_is_refused(shape):
    with pytest.raises(ConfigError, match="must be a non-empty matrix"):
        balanced_kmeans(torch.zeros(shape), 2, seed=0)


def test_size_that_does_not_divide_lists_sizes_that_do():
    with pytest.raises(ConfigError, match="d_ff=24 is not divisible by expert_size=7; choose one of 4, 6, 8, 12, 24"):
        balanced_kmeans(features("random", n=24, width=4), 7, seed=0)


def test_benchmark_compares_small_layers_with_the_reference():
    rows = bench.bench_grouping(sizes=[(64, 16, 8)], seeds=[0])
    assert [row["features"] for row in rows] == ["random", "planted"]
    assert all(row["cost_ratio"] < 1.1 for row in rows)


def test_benchmark_says_why_there_is_no_ratio(monkeypatch):
    monkeypatch.setattr(bench, "_REFERENCE", "no-such-package-of-that-name")
    for reference, why in ((True, "not installed: pip install"), (False, "not asked for")):
        row = bench.bench_grouping(sizes=[(16, 4, 4)], seeds=[0], reference=reference)[0]
        assert row["cost_ratio"] is None
        assert row["reference"].startswith(why)
