from __future__ import annotations

import pytest
import torch

import lte
from lte.errors import ConfigError
from lte.grouping import GROUPINGS, Activations, NeuronGrouping, get_grouping, register_grouping
from lte.ops import FFNWeights
from tests import models

D_FF, D_MODEL, SIZE = 96, 24, 8


def weights(seed: int = 0, gated: bool = True) -> FFNWeights:
    generator = torch.Generator().manual_seed(seed)
    up, down, gate = (torch.randn(D_FF, D_MODEL, generator=generator) for _ in range(3))
    return FFNWeights(up=up, down=down, gate=gate if gated else None)


def activations(hidden: torch.Tensor | None = None) -> Activations:
    generator = torch.Generator().manual_seed(9)
    hidden = torch.randn(50, D_FF, generator=generator) if hidden is None else hidden
    numbers = torch.arange(len(hidden))[:, None].float()  # an input that leads back to its hidden values
    inputs = torch.cat([numbers, torch.randn(len(hidden), D_MODEL - 1, generator=generator)], dim=1)
    return Activations(inputs, lambda x: hidden[x[:, 0].long()])


@pytest.mark.parametrize("name", sorted(GROUPINGS))
def test_a_grouping_names_every_neuron_once_and_follows_its_seed(name):
    state = torch.get_rng_state()
    group = get_grouping(name)
    first, again, other = (group(weights(), SIZE, seed=seed, activations=activations()) for seed in (0, 0, 1))
    assert sorted(first.permutation.tolist()) == list(range(D_FF))
    assert first.n_experts == D_FF // SIZE
    assert torch.equal(first.permutation, again.permutation)
    assert not torch.equal(first.permutation, other.permutation) or name != "random"
    assert torch.equal(torch.get_rng_state(), state)


def test_kmeans_looks_at_the_gate_of_a_gated_ffn_and_at_w1_otherwise():
    group = get_grouping("kmeans")
    plain = FFNWeights(up=weights().gate, down=weights().down)
    gated = group(weights(), SIZE, seed=0).permutation
    assert torch.equal(gated, group(plain, SIZE, seed=0).permutation)
    assert not torch.equal(gated, group(weights(gated=False), SIZE, seed=0).permutation)


def test_coactivation_finds_neurons_that_fire_together():
    labels = torch.arange(D_FF) % (D_FF // SIZE)
    generator = torch.Generator().manual_seed(0)
    fires = torch.rand(200, D_FF // SIZE, generator=generator) < 0.2
    active = fires[:, labels].float() * (1 + 0.1 * torch.randn(200, D_FF, generator=generator))
    grouping = get_grouping("coactivation")(weights(), SIZE, seed=0, activations=activations(active))
    for expert in grouping.permutation.view(-1, SIZE):
        assert len(set(labels[expert].tolist())) == 1


def test_coactivation_without_calibration_says_how():
    with pytest.raises(ConfigError, match=r"lte.sparsify\(model, config, calibration=batches\)"):
        get_grouping("coactivation")(weights(), SIZE, seed=0)


def test_coactivation_through_sparsify_leaves_padding_out():
    batch = models.inputs(4, 10)
    padded = {key: torch.cat([value, torch.zeros(4, 5, dtype=value.dtype)], dim=1) for key, value in batch.items()}
    config = lte.LTEConfig(expert_size=8, grouping="coactivation", router_init="random")
    states = [
        lte.sparsify(models.build("opt"), config, calibration=[inputs]).state_dict() for inputs in (batch, padded)
    ]
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def test_unknown_grouping_lists_the_known_ones():
    with pytest.raises(
        ConfigError,
        match="unknown grouping 'magic'; known groupings: coactivation, kmeans, kmeans-all, none, predicted, random",
    ):
        get_grouping("magic")


def test_a_grouping_can_be_registered(monkeypatch):
    monkeypatch.setattr("lte.grouping.GROUPINGS", dict(GROUPINGS))
    register_grouping("reversed", lambda w, size, **_: NeuronGrouping(torch.arange(w.d_ff).flip(0), size))
    lte.sparsify(models.build("llama"), lte.LTEConfig(expert_size=8, grouping="reversed", router_init="random"))


@pytest.mark.parametrize("name", sorted(GROUPINGS))
def test_indivisible_size_lists_what_fits(name):
    with pytest.raises(ConfigError, match="d_ff=96 is not divisible by expert_size=36; choose one of 4, 6, 8, 12"):
        get_grouping(name)(weights(), 36, seed=0, activations=activations())


def test_a_grouping_refuses_what_is_not_a_permutation():
    with pytest.raises(ConfigError, match="every neuron exactly once"):
        NeuronGrouping(torch.tensor([0, 0, 1, 2]), 2)
    with pytest.raises(ConfigError, match=r"exactly 2 neurons, got sizes \[3, 1\]"):
        NeuronGrouping.from_labels(torch.tensor([0, 0, 0, 1]), 2)


def test_nan_weights_are_refused():
    broken = weights()
    broken.gate[3, 3] = float("nan")
    with pytest.raises(ConfigError, match="gate weights hold NaN or infinity for 1 of 96 neurons"):
        get_grouping("kmeans")(broken, SIZE, seed=0)
