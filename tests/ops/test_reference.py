from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lte.ops import ACTIVATIONS, FFNWeights, sparse_ffn_reference

T, D, N, E = 5, 12, 24, 6


def weights(activation: str, gated: bool, biased: bool) -> FFNWeights:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return FFNWeights(
        up=draw(N, D),
        down=draw(N, D),
        gate=draw(N, D) if gated else None,
        up_bias=draw(N) if biased else None,
        gate_bias=draw(N) if gated and biased else None,
        down_bias=draw(D) if biased else None,
        activation=activation,
    )


def one_neuron(x: torch.Tensor, w: FFNWeights, n: int) -> torch.Tensor:
    """What neuron n adds to the output, in scalars as far as that goes."""
    up = x @ w.up[n] + (0 if w.up_bias is None else w.up_bias[n])
    act = ACTIVATIONS[w.activation]
    if w.gate is None:
        return act(up)[:, None] * w.down[n]
    gate = x @ w.gate[n] + (0 if w.gate_bias is None else w.gate_bias[n])
    return (act(gate) * up)[:, None] * w.down[n]


@pytest.mark.parametrize("biased", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_sum_over_the_neurons_of_active_experts(activation, gated, biased):
    w, x = weights(activation, gated, biased), torch.randn(T, D)
    mask = torch.rand(T, E, generator=torch.Generator().manual_seed(1)) < 0.5
    expected = torch.zeros(T, D) if w.down_bias is None else w.down_bias.repeat(T, 1)
    for neuron in range(N):
        active = mask[:, neuron // (N // E)].float()
        expected = expected + active[:, None] * one_neuron(x, w, neuron)
    torch.testing.assert_close(sparse_ffn_reference(x, w, mask), expected, atol=1e-4, rtol=1e-4)


def test_all_experts_are_the_dense_ffn_and_none_the_bias():
    w, x = weights("silu", True, True), torch.randn(T, D)
    dense = F.linear(F.silu(F.linear(x, w.gate, w.gate_bias)) * F.linear(x, w.up, w.up_bias), w.down.T, w.down_bias)
    torch.testing.assert_close(sparse_ffn_reference(x, w), dense)
    torch.testing.assert_close(sparse_ffn_reference(x, w, torch.ones(T, E, dtype=torch.bool)), dense)
    none = sparse_ffn_reference(x, w, torch.zeros(T, E, dtype=torch.bool))
    torch.testing.assert_close(none, w.down_bias.repeat(T, 1))


def test_permuting_the_neurons_changes_nothing():
    w, x = weights("gelu", True, True), torch.randn(T, D)
    before = sparse_ffn_reference(x, w)
    w.permute_(torch.randperm(N))
    torch.testing.assert_close(sparse_ffn_reference(x, w), before)
