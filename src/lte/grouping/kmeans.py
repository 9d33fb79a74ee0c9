"""Balanced k-means: clusters of exactly equal size, found by swapping pairs of rows.

With every cluster of size S, the within-cluster cost of rows x is ``sum |x_i|^2 - sum_k |sum_{i in k} x_i|^2 / S``.
It needs inner products only, so everything after the Gram matrix is independent of the features' width. Seeding is
k-means++ (Arthur & Vassilvitskii 2007); assignment under the size constraint uses entropic optimal transport
(Cuturi 2013); the swap search is the balanced analogue of Hartigan's exchange method. Many rows are first
halved, again and again, between the centres of a k-means of free sizes, and clustered part by part, so that memory
grows linearly with their number.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lte.errors import ConfigError
from lte.grouping.base import Activations, NeuronGrouping, check_divisible
from lte.ops.weights import FFNWeights

_MAX_SEEDINGS = 10
_MAX_RECLUSTERINGS = 30
_NEIGHBOURHOOD = 10
_LLOYD_ITERATIONS = 5
_PRICE_STEPS = 30
_MAX_SWEEPS = 8
_SWEEP_TOLERANCE = 1e-3
_PART_ROWS = 1536
_LANDMARKS = 512
_SEEDING_ROUNDS = 4
_FREE_ITERATIONS = 3
_HALVING_ITERATIONS = 8
_BLOCK_ROWS = 1024

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Indices = NDArray[np.int64]


def group_kmeans(
    weights: FFNWeights, expert_size: int, *, seed: int, activations: Activations | None = None
) -> NeuronGrouping:
    """Neurons whose rows of the input matrix point the same way share an expert (paper section 4.1).

    ``activations`` is not used. Raises ConfigError if ``expert_size`` does not divide F or a weight is not finite.
    """
    check_divisible(weights.d_ff, expert_size)
    name = "up-projection weights" if weights.gate is None else "gate weights"
    features_FD = normalise_rows(weights.input_matrix)
    labels_F = balanced_kmeans(features_FD, expert_size, seed=seed, name=name)
    return NeuronGrouping.from_labels(labels_F, expert_size)


def group_kmeans_all(
    weights: FFNWeights, expert_size: int, *, seed: int, activations: Activations | None = None
) -> NeuronGrouping:
    """The same on all of a neuron's weights: its rows of gate, up and down side by side, each of norm 1."""
    check_divisible(weights.d_ff, expert_size)
    rows = [normalise_rows(w) for w in (weights.gate, weights.up, weights.down) if w is not None]
    labels_F = balanced_kmeans(torch.cat(rows, dim=1), expert_size, seed=seed, name="FFN weights")
    return NeuronGrouping.from_labels(labels_F, expert_size)


def normalise_rows(features_ND: Tensor) -> Tensor:
    """Rows scaled to L2 norm 1, in fp32; zero rows stay zero, rows with a NaN or infinity hold a NaN."""
    x_ND = features_ND.detach().float()
    # Dividing by the largest entry first keeps the squares of very small and very large rows in range.
    peak_N1 = torch.linalg.vector_norm(x_ND, torch.inf, dim=1, keepdim=True)
    x_ND = x_ND / torch.where(peak_N1 > 0, peak_N1, 1.0)
    return x_ND.div_(x_ND.norm(dim=1, keepdim=True).clamp_min(1e-12))


def clustering_cost(features_ND: Tensor, labels_N: Tensor) -> float:
    """Sum of squared distances of the rows to the mean of their cluster, in fp64; labels are [N] long."""
    x_ND = features_ND.detach().double()
    sums_KD = x_ND.new_zeros(int(labels_N.max()) + 1, x_ND.shape[1]).index_add_(0, labels_N, x_ND)
    means_KD = sums_KD / torch.bincount(labels_N)[:, None]
    return float((x_ND - means_KD[labels_N]).square().sum())


def balanced_kmeans(
    features_ND: Tensor, cluster_size: int, *, seed: int, effort: int | None = None, name: str = "features"
) -> Tensor:
    """Cluster the rows into N / cluster_size clusters of exactly ``cluster_size`` rows.

    The result depends on the features and the seed only: neither on the global random state nor on the number
    of threads; the work is bounded by counts, not by the clock. More than 1536 rows are clustered in parts of at most
    that size (or one cluster), so memory is 4 * 1536^2 bytes for a part's Gram matrix and about 10 KiB for each row.

    Args:
        features_ND: any floating dtype, any device; only inner products are computed there, the rest on the CPU.
        cluster_size: S; divides N.
        seed: of the random choices.
        effort: how often to try again: k-means++ starts, of which the best third is refined, and clusterings of
            part of the result. By default 2^20 / N^2, with N the rows of a part: 0 beyond 1024.
        name: what the rows are, for error messages.

    Returns:
        [N] long, the cluster of each row, on the device of the features.

    Raises:
        ConfigError: ``cluster_size`` does not divide N, the features are not a matrix or not finite.
    """
    _check_features(features_ND, name)
    n_rows = features_ND.shape[0]
    check_divisible(n_rows, cluster_size)
    n_clusters = n_rows // cluster_size
    if n_clusters == 1 or cluster_size == 1:
        return torch.arange(n_rows, device=features_ND.device) // cluster_size
    rng = np.random.default_rng(seed)
    if n_rows <= _PART_ROWS:
        members_KS = _cluster_part(features_ND, cluster_size, effort, rng)
    else:
        stand_in_NL = _landmark_products(features_ND, rng)
        centres_CL, nearest_N = _free_kmeans(stand_in_NL, n_clusters, rng)
        parts = _halve(centres_CL, nearest_N, np.arange(n_rows), cluster_size, rng)
        members_KS = np.concatenate(
            [rows_M[_cluster_part(_take(features_ND, rows_M), cluster_size, effort, rng)] for rows_M in parts]
        )
        _swap_across_parts(features_ND, stand_in_NL, members_KS, rng)
    # Numbered by first member, so that starts which end in the same clusters give the same labels.
    members_KS = members_KS[members_KS.min(axis=1).argsort()]
    labels_N = np.empty(n_rows, dtype=np.int64)
    labels_N[members_KS] = np.arange(n_clusters)[:, None]
    return torch.from_numpy(labels_N).to(features_ND.device)


def _check_features(features_ND: Tensor, name: str) -> None:
    if features_ND.ndim != 2 or features_ND.numel() == 0:
        raise ConfigError(f"{name} must be a non-empty matrix with one row per neuron, got {tuple(features_ND.shape)}")
    bad_N = ~torch.cat([block.isfinite().all(dim=1) for block in features_ND.split(_BLOCK_ROWS)])
    if bad_N.any():
        raise ConfigError(
            f"{name} hold NaN or infinity for {int(bad_N.sum())} of {bad_N.numel()} neurons "
            f"(first: neuron {int(bad_N.nonzero()[0])}); repair the checkpoint or the data before grouping"
        )


def _take(features_ND: Tensor, rows_M: Indices) -> Tensor:
    return features_ND.detach()[torch.from_numpy(rows_M).to(features_ND.device)]


def _landmark_products(features_ND: Tensor, rng: np.random.Generator) -> Tensor:
    """Directions of the rows' inner products with a few drawn rows: a stand-in for the rows, [N, 512] fp32 integers."""
    n_rows = features_ND.shape[0]
    drawn_L = np.sort(rng.choice(n_rows, min(_LANDMARKS, n_rows), replace=False))
    landmarks_LD = _take(features_ND, drawn_L).float()
    smallest, largest = features_ND.detach().aminmax()
    peak = torch.maximum(-smallest, largest).float().clamp_min(torch.finfo(torch.float32).tiny)
    mean_D = (landmarks_LD / peak).mean(dim=0)
    landmarks_LD = _directions(landmarks_LD / peak - mean_D)
    blocks = features_ND.detach().split(_BLOCK_ROWS)
    products_NL = torch.cat([_directions(block.float() / peak - mean_D) @ landmarks_LD.T for block in blocks])
    return _directions(products_NL.cpu())


def _free_kmeans(x_NL: Tensor, n_centres: int, rng: np.random.Generator) -> tuple[Doubles, Indices]:
    """Spherical k-means of directions, sizes left free: (about ``n_centres`` centres [C, L], nearest centre [N])."""
    n_rows = len(x_NL)
    grid = _grid(x_NL.shape[1])
    distance_N = np.ones(n_rows)
    chosen: list[Tensor] = []
    # As k-means++, but many rows at a time.
    for _ in range(_SEEDING_ROUNDS):
        cumulative_N = distance_N.cumsum()
        drawn = np.searchsorted(
            cumulative_N, rng.random(-(-n_centres // _SEEDING_ROUNDS)) * cumulative_N[-1], side="right"
        )
        chosen.append(x_NL[torch.from_numpy(np.minimum(drawn, n_rows - 1))])
        similarity_N, _ = _nearest(x_NL, chosen[-1])
        distance_N = np.minimum(distance_N, np.maximum(1 - similarity_N.double().numpy() / grid**2, 0))
    centres_CL = torch.cat(chosen)
    for _ in range(_FREE_ITERATIONS):
        _, nearest_N = _nearest(x_NL, centres_CL)
        sums_CL = torch.zeros(centres_CL.shape, dtype=torch.float64).index_add_(0, nearest_N, x_NL.double())
        centres_CL = _directions(sums_CL)
    _, nearest_N = _nearest(x_NL, centres_CL)
    return centres_CL.double().numpy(), nearest_N.numpy()


def _nearest(x_NL: Tensor, centres_CL: Tensor) -> tuple[Tensor, Tensor]:
    """Inner product with the nearest centre [N], and its number [N]."""
    best = [(block @ centres_CL.T).max(dim=1) for block in x_NL.split(_BLOCK_ROWS)]
    return torch.cat([found.values for found in best]), torch.cat([found.indices for found in best])


def _halve(
    centres_CL: Doubles, nearest_N: Indices, rows_M: Indices, size: int, rng: np.random.Generator
) -> list[Indices]:
    """Parts of the rows of at most 1536 rows or one cluster, all multiples of ``size``: balanced 2-means, recursively.

    Rows stand where their nearest centre does, so that those of one centre mostly share a part. The centres' integers
    and the rounding of the direction keep every sum an integer <= 2^53, exact in fp64.
    """
    n_rows = len(rows_M)
    n_left = n_rows // size // 2 * size
    if n_rows <= _PART_ROWS or not n_left:
        return [rows_M]
    nearest_M = nearest_N[rows_M]
    direction_L = rng.integers(-(2**8), 2**8, size=(centres_CL.shape[1],)).astype(np.float64)
    for _ in range(_HALVING_ITERATIONS):
        order_M = np.lexsort((nearest_M, (centres_CL @ direction_L)[nearest_M]))
        # From the mean of one side to that of the other, but for a factor.
        side_M = np.full(n_rows, float(n_left))
        side_M[order_M[:n_left]] = n_left - n_rows
        gap_L = np.asarray(np.bincount(nearest_M, weights=side_M, minlength=len(centres_CL)) @ centres_CL)
        direction_L = np.rint(gap_L * (2**8 / max(np.abs(gap_L).max(), 1.0)))
    halves = np.sort(order_M[:n_left]), np.sort(order_M[n_left:])
    return [part for half in halves for part in _halve(centres_CL, nearest_N, rows_M[half], size, rng)]


def _swap_across_parts(features_ND: Tensor, stand_in_NL: Tensor, members_KS: Indices, rng: np.random.Generator) -> None:
    """Swap rows between the loosest half of the clusters, in parts of their own; in place.

    Brings together what the first parts left over: rows whose like are in another part.
    """
    n_clusters, size = members_KS.shape
    sums_KL = torch.stack(
        [stand_in_NL[torch.from_numpy(rows_S)].sum(dim=0, dtype=torch.float64) for rows_S in members_KS]
    )
    loosest_C = np.argsort(sums_KL.square().sum(dim=1).numpy(), kind="stable")[: n_clusters // 2]
    centres_CL = _directions(sums_KL[torch.from_numpy(loosest_C)]).double().numpy()
    own_M = np.repeat(np.arange(len(loosest_C)), size)
    for part_M in _halve(centres_CL, own_M, np.arange(len(own_M)), size, rng):
        clusters_P = loosest_C[np.unique(own_M[part_M])]
        if len(clusters_P) == 1:
            continue
        rows_M = members_KS[clusters_P].ravel()
        own_PS = np.arange(len(rows_M)).reshape(-1, size)
        members_KS[clusters_P] = rows_M[_swap_sweeps(_gram(_take(features_ND, rows_M)), own_PS, rng)[1]]


def _cluster_part(features_ND: Tensor, size: int, effort: int | None, rng: np.random.Generator) -> Indices:
    """Members [K, S] of the clusters of rows few enough for their Gram matrix."""
    n_rows = features_ND.shape[0]
    if n_rows == size:
        return np.arange(n_rows)[None]
    if effort is None:
        effort = 2**20 // n_rows**2
    seedings = min(_MAX_SEEDINGS, max(1, effort))
    gram_NN = _gram(features_ND)
    starts = sorted((_lloyd(gram_NN, size, rng) for _ in range(seedings)), key=lambda found: found[0])
    refined = [_swap_sweeps(gram_NN, members_KS, rng) for _, members_KS in starts[: (seedings + 2) // 3]]
    _, members_KS = min(refined, key=lambda found: found[0])
    for _ in range(min(_MAX_RECLUSTERINGS, len(members_KS), effort)):
        _recluster_neighbours(gram_NN, members_KS, rng)
    return members_KS


def _gram(features_ND: Tensor) -> Floats:
    """Inner products of the centred rows, [N, N] fp32, the same bits whatever the number of threads."""
    x_ND = features_ND.detach().float()
    x_ND = x_ND / x_ND.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    # Distances do not change with the origin; a large common mean would only cost precision.
    x_ND -= x_ND.mean(dim=0)
    directions_ND = _directions(x_ND)
    scale_N = x_ND.norm(dim=1) / _grid(x_ND.shape[1])
    gram_NN = directions_ND @ directions_ND.T
    return gram_NN.mul_(scale_N[:, None]).mul_(scale_N).cpu().numpy()


def _directions(x_ND: Tensor) -> Tensor:
    """The rows' directions, rounded to integers of norm <= 2^12, in fp32.

    A matrix product's rounding depends on how it is split over threads. Between these rows, by Cauchy-Schwarz, every
    partial sum is an integer <= 2^24: exact in fp32.
    """
    return normalise_rows(x_ND).mul_(_grid(x_ND.shape[1])).round_()


def _grid(width: int) -> float:
    """Length whose roundings have norm <= 2^12."""
    return float(2**12 - width**0.5 / 2)


def _cluster_sums(gram_NN: Floats, members_KS: Indices) -> Floats:
    """Inner product of every row with every cluster's sum of members, [K, N]."""
    sums_KN = gram_NN[members_KS[:, 0]]
    for slot in range(1, members_KS.shape[1]):
        sums_KN += gram_NN[members_KS[:, slot]]
    return sums_KN


def _cost(gram_NN: Floats, own_KS: Floats) -> float:
    """Within-cluster cost; ``own_KS`` are the members' inner products with their own cluster's sum."""
    return float(gram_NN.diagonal().sum(dtype=np.float64) - own_KS.sum(dtype=np.float64) / own_KS.shape[1])


def _lloyd(gram_NN: Floats, size: int, rng: np.random.Generator) -> tuple[float, Indices]:
    """k-means++ seeds, then Lloyd iterations with balanced assignment while they help; (cost, members [K, S])."""
    seeds_K = _seed_rows(gram_NN, gram_NN.shape[0] // size, rng)
    members_KS = _assign((gram_NN.diagonal()[seeds_K, None] - 2 * gram_NN[seeds_K]).T, size)
    best_cost, best_members_KS = np.inf, members_KS
    for _ in range(_LLOYD_ITERATIONS):
        sums_KN = _cluster_sums(gram_NN, members_KS)
        own_KS = np.take_along_axis(sums_KN, members_KS, axis=1)
        cost = _cost(gram_NN, own_KS)
        if cost >= best_cost * (1 - _SWEEP_TOLERANCE):
            break
        best_cost, best_members_KS = cost, members_KS
        members_KS = _assign((own_KS.sum(axis=1)[:, None] / size**2 - 2 * sums_KN / size).T, size)
    return best_cost, best_members_KS


def _seed_rows(gram_NN: Floats, n_clusters: int, rng: np.random.Generator) -> Indices:
    """k-means++: rows drawn with probability proportional to the squared distance to those already drawn."""
    norms_N = gram_NN.diagonal()
    seeds = [int(rng.integers(len(norms_N)))]
    distance_N = np.full(len(norms_N), np.inf)
    while len(seeds) < n_clusters:
        latest = seeds[-1]
        distance_N = np.minimum(distance_N, np.maximum(norms_N + norms_N[latest] - 2 * gram_NN[latest], 0))
        cumulative_N = distance_N.cumsum()
        drawn = np.searchsorted(cumulative_N, rng.random() * cumulative_N[-1], side="right")
        # Fewer distinct rows than clusters: all distances are 0 and the search runs off the end.
        seeds.append(min(int(drawn), len(norms_N) - 1))
    return np.array(seeds)


def _assign(cost_NK: Floats, size: int) -> Indices:
    """Members [K, S] of a near-cheapest assignment of the rows to clusters of exactly ``size``."""
    _, n_clusters = cost_NK.shape
    priced_NK = cost_NK + _prices(cost_NK, size)
    two_best_N2 = np.partition(priced_NK, 1, axis=1)[:, :2]
    room = [size] * n_clusters
    members: list[list[int]] = [[] for _ in range(n_clusters)]
    closed_K = np.zeros(n_clusters, dtype=np.float32)
    # Rows with most to lose choose first.
    for row in np.argsort(two_best_N2[:, 0] - two_best_N2[:, 1], kind="stable").tolist():
        cluster = int((priced_NK[row] + closed_K).argmin())
        members[cluster].append(row)
        room[cluster] -= 1
        if room[cluster] == 0:
            closed_K[cluster] = np.inf
    return np.array(members)


def _prices(cost_NK: Floats, size: int) -> Floats:
    """Prices [K] under which rows that minimise cost + price ask for about ``size`` places in every cluster."""
    price_K = np.zeros(cost_NK.shape[1], dtype=np.float32)
    spread = float((cost_NK.mean(axis=1) - cost_NK.min(axis=1)).mean())
    for temperature in max(spread, 1e-30) * np.geomspace(0.3, 0.01, _PRICE_STEPS):
        demand_NK = (cost_NK + price_K) / np.float32(-temperature)
        demand_NK -= demand_NK.max(axis=1, keepdims=True)
        np.exp(demand_NK, out=demand_NK)
        demand_NK /= demand_NK.sum(axis=1, keepdims=True)
        price_K += np.float32(temperature) * np.log(np.maximum(demand_NK.sum(axis=0) / size, 1e-6))
    return price_K


def _swap_sweeps(gram_NN: Floats, members_KS: Indices, rng: np.random.Generator) -> tuple[float, Indices]:
    """Swap rows between clusters, all pairs of clusters per sweep, until a sweep gains little; (cost, members)."""
    members_KS = members_KS.copy()
    # Below this a gain is rounding error.
    least_gain = 1e-5 * float(gram_NN.diagonal().mean())
    sums_KN = _cluster_sums(gram_NN, members_KS)
    cost = _cost(gram_NN, np.take_along_axis(sums_KN, members_KS, axis=1))
    for _ in range(_MAX_SWEEPS):
        for left_P, right_P in _pairings(len(members_KS), rng):
            _swap_between(gram_NN, sums_KN, members_KS, left_P, right_P, least_gain)
        sums_KN = _cluster_sums(gram_NN, members_KS)
        before, cost = cost, _cost(gram_NN, np.take_along_axis(sums_KN, members_KS, axis=1))
        if cost >= before * (1 - _SWEEP_TOLERANCE):
            break
    return cost, members_KS


def _recluster_neighbours(gram_NN: Floats, members_KS: Indices, rng: np.random.Generator) -> None:
    """Cluster afresh the rows of a random cluster and those nearest to it; keep what is cheaper, in place.

    Repairs what swaps cannot: one natural cluster split in two while two others share one.
    """
    n_clusters, size = members_KS.shape
    sums_KN = _cluster_sums(gram_NN, members_KS)
    centre_products_KK = np.stack([sums_KN[:, row].sum(axis=1) for row in members_KS], axis=1)
    distance_K = centre_products_KK.diagonal() - 2 * centre_products_KK[rng.integers(n_clusters)]
    near_C = np.argsort(distance_K, kind="stable")[: min(_NEIGHBOURHOOD, 2 + n_clusters // 3)]
    rows_M = members_KS[near_C].ravel()
    near_gram_MM = gram_NN[np.ix_(rows_M, rows_M)]
    own_CS = np.take_along_axis(sums_KN, members_KS, axis=1)[near_C]
    cost, found_CS = _swap_sweeps(near_gram_MM, _lloyd(near_gram_MM, size, rng)[1], rng)
    # Not for a rounding error: the same clusters under other numbers are no gain.
    if cost < _cost(near_gram_MM, own_CS) * (1 - _SWEEP_TOLERANCE):
        members_KS[near_C] = rows_M[found_CS]


def _pairings(n_clusters: int, rng: np.random.Generator) -> Iterator[tuple[Indices, Indices]]:
    """Rounds of disjoint pairs in which every two clusters meet once (a round-robin tournament)."""
    ring = rng.permutation(n_clusters + n_clusters % 2)
    half = len(ring) // 2
    for _ in range(len(ring) - 1):
        left_P, right_P = ring[:half], ring[half:][::-1]
        # With an odd number of clusters, one of them meets a number that stands for nobody.
        real_P = np.maximum(left_P, right_P) < n_clusters
        yield left_P[real_P], right_P[real_P]
        ring = np.concatenate([ring[:1], ring[-1:], ring[1:-1]])


def _swap_between(
    gram_NN: Floats,
    sums_KN: Floats,
    members_KS: Indices,
    left_P: Indices,
    right_P: Indices,
    least_gain: float,
) -> None:
    """Make, in P disjoint pairs of clusters at once, the best swap while there is one; updates members and sums.

    Swapping i of cluster a with j of cluster b lowers S/2 times the cost by
    ``x_i.(b - a) + x_j.(a - b) + |x_i - x_j|^2``, with a, b the clusters' sums: exact, moving centroids included.
    """
    n_rows, size = gram_NN.shape[0], members_KS.shape[1]
    norms_N = gram_NN.diagonal()
    for _ in range(size):
        i_PS, j_PS = members_KS[left_P], members_KS[right_P]
        left_P1, right_P1 = left_P[:, None], right_P[:, None]
        pull_i_PS = sums_KN[right_P1, i_PS] - sums_KN[left_P1, i_PS] + norms_N[i_PS]
        pull_j_PS = sums_KN[left_P1, j_PS] - sums_KN[right_P1, j_PS] + norms_N[j_PS]
        gain_PSS = gram_NN.reshape(-1).take(i_PS[:, :, None] * n_rows + j_PS[:, None, :])
        gain_PSS *= -2
        gain_PSS += pull_i_PS[:, :, None]
        gain_PSS += pull_j_PS[:, None, :]
        gain_PX = gain_PSS.reshape(len(left_P), -1)
        best_P = gain_PX.argmax(axis=1)
        gains_P = np.take_along_axis(gain_PX, best_P[:, None], axis=1)[:, 0] > least_gain
        if not gains_P.any():
            return
        left_P, right_P, best_P = left_P[gains_P], right_P[gains_P], best_P[gains_P]
        slot_i_P, slot_j_P = best_P // size, best_P % size
        i_P, j_P = members_KS[left_P, slot_i_P], members_KS[right_P, slot_j_P]
        members_KS[left_P, slot_i_P], members_KS[right_P, slot_j_P] = j_P, i_P
        moved_PN = gram_NN[j_P] - gram_NN[i_P]
        sums_KN[left_P] += moved_PN
        sums_KN[right_P] -= moved_PN
