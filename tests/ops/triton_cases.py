"""What the Triton kernels must do, against the oracle. Run by ``test_triton.py``, on a GPU or under the interpreter."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch

from lte.errors import LTEError
from lte.ops import ACTIVATIONS, FFNCopy, FFNWeights, copy_scores_reference, sparse_ffn_reference
from lte.ops.lowbit import quantize
from lte.ops.nested import NestedFFN, NestedMatrix
from lte.ops.quantized import QuantizedFFN
from lte.ops.triton import (
    autotune,
    configs,
    copy_scores,
    launch,
    nested_ffn,
    quantized_ffn,
    quantized_linear,
    routed_ffn,
    sparse_ffn,
)
from lte.ops.triton.nested import nested_launches
from tests.ops.test_nested import nested

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

D, N, E = 40, 12, 5
F = N * E
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Against the float32 oracle on the same (rounded) inputs, relative to the largest output: float32 differs by the order
# of the sums, the others by one rounding of the output and, for tiles of tokens, one of the hidden values.
# The interpreter moreover truncates to bfloat16 where a GPU rounds, which biases every hidden value towards zero.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3 if ON_GPU else 1.6e-2, torch.float16: 1e-3}


def draw(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def make(
    activation: str = "silu", *, gated: bool = True, biased: bool = False, dtype=torch.float32, d=D, n=N, e=E
) -> FFNWeights:
    f = n * e

    def tensor(*shape: int, seed: int) -> torch.Tensor:
        return draw(*shape, seed=seed, scale=d**-0.5).to(DEVICE, dtype)

    return FFNWeights(
        up=tensor(f, d, seed=0),
        down=tensor(f, d, seed=1),
        gate=tensor(f, d, seed=2) if gated else None,
        up_bias=tensor(f, seed=3) if biased else None,
        gate_bias=tensor(f, seed=4) if gated and biased else None,
        down_bias=tensor(d, seed=5) if biased else None,
        activation=activation,
    )


def inputs(n_tokens: int, dtype=torch.float32, d: int = D) -> torch.Tensor:
    return draw(n_tokens, d, seed=6, scale=2.0).to(DEVICE, dtype)


def masks(n_tokens: int, e: int = E, share: float = 0.5) -> torch.Tensor:
    return (torch.rand(n_tokens, e, generator=torch.Generator().manual_seed(7)) < share).to(DEVICE)


def in_float32(w: FFNWeights) -> FFNWeights:
    tensors = {field.name: getattr(w, field.name) for field in fields(w)}
    return replace(w, **{name: value.float() for name, value in tensors.items() if isinstance(value, torch.Tensor)})


def assert_matches(x: torch.Tensor, w: FFNWeights, expert_weights: torch.Tensor | None) -> None:
    actual = sparse_ffn(x, w, expert_weights)
    expected = sparse_ffn_reference(x.float(), in_float32(w), expert_weights)
    assert actual.dtype == x.dtype
    assert actual.shape == x.shape
    tolerance = TOLERANCE[x.dtype] * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual.float(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation_shape_and_dtype(activation, gated, dtype):
    for n_tokens in (1, 5):
        assert_matches(inputs(n_tokens, dtype), make(activation, gated=gated, dtype=dtype), masks(n_tokens))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("n_tokens", [0, 1, 2, 5, 17, 70])
def test_every_number_of_tokens_with_biases(n_tokens, gated):
    w, x = make("gelu", gated=gated, biased=True), inputs(n_tokens)
    scales = torch.rand(n_tokens, E, generator=torch.Generator().manual_seed(8)).to(DEVICE)
    for expert_weights in (None, masks(n_tokens), scales * masks(n_tokens)):
        if n_tokens == 0:
            assert sparse_ffn(x, w, expert_weights).shape == (0, D)
        else:
            assert_matches(x, w, expert_weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("n_tokens", [1, 17])
def test_no_expert_and_all_experts(n_tokens, dtype):
    w, x = make(biased=True, dtype=dtype), inputs(n_tokens, dtype)
    none = torch.zeros(n_tokens, E, dtype=torch.bool, device=DEVICE)
    assert torch.equal(sparse_ffn(x, w, none), w.down_bias.expand(n_tokens, -1))
    assert not sparse_ffn(x, replace(w, down_bias=None), none).any()
    assert_matches(x, w, ~none)


@pytest.mark.parametrize("n_tokens", [1, 3])
@pytest.mark.parametrize(("d", "n", "e"), [(16, 32, 4), (72, 7, 9), (33, 1, 50), (130, 128, 2), (24, 4, 33), (8, 8, 1)])
def test_sizes_that_divide_nothing(d, n, e, n_tokens):
    assert_matches(inputs(n_tokens, d=d), make(d=d, n=n, e=e), masks(n_tokens, e))


@pytest.mark.parametrize("n_tokens", [1, 5, 70])
def test_inactive_experts_and_fresh_memory_may_hold_anything(n_tokens, monkeypatch):
    w, x = make(biased=True), inputs(n_tokens)
    mask = masks(n_tokens)
    mask[:, [1, 3]] = False
    expected = sparse_ffn_reference(x, w, mask)
    for name in ("up", "down", "gate"):
        getattr(w, name)[N : 2 * N] = float("nan")
        getattr(w, name)[3 * N : 4 * N] = float("inf")
    real = torch.empty

    def poisoned(*args, **kwargs):
        memory = real(*args, **kwargs)
        return memory.fill_(float("nan") if memory.is_floating_point() else torch.iinfo(memory.dtype).max)

    monkeypatch.setattr(torch, "empty", poisoned)
    torch.testing.assert_close(sparse_ffn(x, w, mask), expected, atol=1e-5, rtol=1e-5)
    router, bias = torch.zeros(E, D, device=DEVICE), torch.tensor([9.0, -9.0, 9.0, -9.0, 9.0], device=DEVICE)
    constant = (bias > 0).expand(n_tokens, -1)
    assert torch.equal(routed_ffn(x, router, bias, 0.5, w), sparse_ffn(x, w, constant))


def test_overflow_of_a_token_in_an_expert_it_does_not_want():
    w = make("relu", dtype=torch.float16)
    x = inputs(5, torch.float16)
    x[2] *= 1e4
    mask = masks(5)
    mask[2] = False
    mask[2, 0] = mask[1, 1] = True
    w.up[:N] = w.gate[:N] = 0.0
    assert sparse_ffn(x, w, mask).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("n_tokens", [1, 17])
def test_same_input_same_bits(n_tokens, dtype):
    w, x, mask = make(dtype=dtype), inputs(n_tokens, dtype), masks(n_tokens)
    first = sparse_ffn(x, w, mask)
    repeats = 50 if ON_GPU else 1
    assert all(torch.equal(first, sparse_ffn(x, w, mask)) for _ in range(repeats))


@pytest.mark.parametrize(("router_dtype", "biased"), [(torch.float32, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("n_tokens", [0, 1, 5, 17, 70])
def test_routed_is_router_then_sparse(n_tokens, biased, router_dtype):
    w, x = make(dtype=torch.bfloat16), inputs(n_tokens, torch.bfloat16)
    router = draw(E, D, seed=9).to(DEVICE, router_dtype)
    bias = draw(E, seed=10).to(DEVICE, router_dtype) if biased else None
    logits = x.float() @ router.float().T + (0 if bias is None else bias.float())
    mask = torch.sigmoid(logits) > 0.4
    assert torch.equal(routed_ffn(x, router, bias, 0.4, w), sparse_ffn(x, w, mask))


@pytest.mark.parametrize("n_tokens", [0, 1, 5, 17])
@pytest.mark.parametrize(
    ("bits", "group", "gated", "biased", "n", "dtype"),
    [
        (3, 64, True, False, 1, torch.bfloat16),
        (2, 32, True, True, 1, torch.float32),
        (4, 64, False, True, 4, torch.float32),
        (1, 128, False, False, 1, torch.float16),
    ],
)
def test_scores_of_a_copy(bits, group, gated, biased, n, dtype, n_tokens):
    w, x = make(gated=gated, biased=biased, dtype=dtype, d=150, n=n, e=60 // n), inputs(n_tokens, dtype, 150)
    gate = None if w.gate is None else quantize(w.gate, bits, group)
    copy = FFNCopy(quantize(w.up, bits, group), w.down.float().norm(dim=1), gate)
    found, wanted = (scores(x, copy, 60 // n, w) for scores in (copy_scores, copy_scores_reference))
    # A value half-way between two integers may go either way.
    torch.testing.assert_close(found, wanted, atol=3e-3 * float(wanted.max() if n_tokens else 1), rtol=3e-3)


@pytest.mark.parametrize("n_tokens", [0, 1, 5, 17])
@pytest.mark.parametrize(
    ("bits", "group", "d", "dtype"),
    [
        (4, 32, 100, torch.float32),
        (4, 64, 200, torch.bfloat16),
        (8, 32, 40, torch.bfloat16),
        (8, 64, 130, torch.float16),
        (2, 32, 64, torch.float32),
        (1, 32, 33, torch.bfloat16),
        (3, 32, 70, torch.float32),
        (3, 64, 130, torch.bfloat16),
        (5, 32, 100, torch.float16),
        (6, 64, 64, torch.bfloat16),
    ],
)
def test_weights_of_few_bits(bits, group, d, dtype, n_tokens):
    gated, biased = bits != 2, bits < 8
    w = make("silu" if gated else "relu", gated=gated, biased=biased, dtype=dtype, d=d, n=2 * group, e=3)
    made, x = QuantizedFFN.of(w, bits, group), inputs(n_tokens, dtype, d)
    plain = in_float32(made.dequantize())
    # One token's sums begin from 1 + code / 2^bits; a tile of tokens rounds weights and hidden values.
    tolerance = TOLERANCE[dtype] * 4

    def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
        assert found.dtype == dtype
        atol = tolerance * max(1.0, float(wanted.abs().max()) if n_tokens else 1.0)
        torch.testing.assert_close(found.float(), wanted, atol=atol, rtol=0)

    mask = masks(n_tokens, 3)
    mask[:1, :2] = torch.tensor([True, False])
    for weights in (mask, mask.to(dtype) * 0.5, None):
        close(quantized_ffn(x, made, weights), sparse_ffn_reference(x.float(), plain, weights))
    router, bias = draw(3, d, seed=9).to(DEVICE), draw(3, seed=10).to(DEVICE)
    decided = torch.sigmoid(x.float() @ router.T + bias) > 0.4
    close(quantized_ffn(x, made, router=(router, bias, 0.4)), sparse_ffn_reference(x.float(), plain, decided))
    close(quantized_linear(x, made.up, w.up_bias), torch.nn.functional.linear(x.float(), plain.up, plain.up_bias))


def test_codes_of_inactive_experts_are_not_read():
    w, x = make(d=64, n=32, e=4), inputs(1, d=64)
    made, mask = QuantizedFFN.of(w, 4, 32), masks(1, 4)
    mask[0] = torch.tensor([True, False, False, True])
    wanted = quantized_ffn(x, made, mask)
    made.up.scales[2:4] = made.gate.scales[4:6] = torch.nan
    made.down.scales[1:3] = torch.nan
    assert torch.equal(quantized_ffn(x, made, mask), wanted)


NESTED = [
    # bits, upper ones, width, neurons, group, gated, dtype
    (4, 4, 100, 70, 64, True, torch.float32),
    (4, 3, 130, 40, 128, True, torch.bfloat16),
    (8, 4, 130, 70, 64, False, torch.float16),
    (6, 3, 64, 33, 64, True, torch.float32),
    (3, 1, 200, 33, 64, True, torch.bfloat16),
    (3, 3, 64, 50, 64, False, torch.float32),
]


@pytest.mark.parametrize("n_tokens", [0, 1, 5, 70])
@pytest.mark.parametrize(("bits", "upper", "d", "f", "group", "gated", "dtype"), NESTED)
def test_two_planes_of_bits(bits, upper, d, f, group, gated, dtype, n_tokens):
    weights = on_device(nested(d, f, bits, upper, group=group, gated=gated, dtype=dtype))
    x = inputs(n_tokens, dtype, d)
    cuts = ((0.1, 0.3), (-1.0, -1.0), (-1.0, math.inf), (0.2, -1.0), (-1.0, 0.2), (1e9, 1e9))
    for cut, fine_cut in cuts if n_tokens == 1 else cuts[:2]:
        found, launches = nested_launches(x, weights, cut, fine_cut, 4)
        if not n_tokens:
            assert nested_ffn(x, weights, cut, fine_cut).shape == (0, d)
            continue
        for one in launches:
            one()
        state_TF = launches[0].args[launches[0].kernel.arg_names.index("state_ptr")]
        check_states(state_TF, x, weights, cut, fine_cut)
        wanted = computed(state_TF, x, weights)
        tolerance = 4 * TOLERANCE[dtype] * max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(found.float(), wanted, atol=tolerance, rtol=0)
        assert torch.equal(found, nested_ffn(x, weights, cut, fine_cut))


def hidden_of(up: torch.Tensor, gate: torch.Tensor | None, weights: NestedFFN) -> torch.Tensor:
    act = ACTIVATIONS[weights.activation]
    up = up if weights.up_bias is None else up + weights.up_bias.float()
    return act(up) if gate is None else act(gate) * up


def products(x: torch.Tensor, weights: NestedFFN, *, fine: bool) -> torch.Tensor:
    """[T, F], hidden values of all neurons by the upper plane or by both."""
    copy = weights.copy
    planes = {"up": (copy.up, weights.up_lower), "gate": (copy.gate, weights.gate_lower)}
    made = {
        name: x.float() @ (NestedMatrix(upper, lower).dequantize() if fine else upper.dequantize()).T
        for name, (upper, lower) in planes.items()
        if upper is not None
    }
    return hidden_of(made["up"], made.get("gate"), weights)


def check_states(state_TF: torch.Tensor, x: torch.Tensor, weights: NestedFFN, cut: float, fine_cut: float) -> None:
    """States are what scores say, but for scores that rounding may move past a cut."""
    scores = products(x, weights, fine=False).abs() * weights.copy.norms
    slack = 1e-5 if x.dtype == torch.float32 else 0.02 * float(scores.max())

    def above(limit: float, by: float) -> torch.Tensor:
        return scores > limit + by if limit >= 0 else torch.ones_like(scores, dtype=torch.bool)

    two = weights.down.lower is not None
    for by, least in ((slack, True), (-slack, False)):
        on = above(cut, by)
        states = on + (on & above(fine_cut, by) if two else torch.zeros_like(on)).int()
        assert (state_TF >= states).all() if least else (state_TF <= states).all()


def computed(state_TF: torch.Tensor, x: torch.Tensor, weights: NestedFFN) -> torch.Tensor:
    """The output where each neuron, for each token, is out, coarse or fine as told."""
    hidden = torch.where(state_TF > 1, *(products(x, weights, fine=fine) for fine in (True, False))) * (state_TF > 0)
    y = hidden @ weights.down.coarse() + (hidden * (state_TF > 1)) @ weights.down.correction()
    return y if weights.down_bias is None else y + weights.down_bias.float()


def on_device(made: Any) -> Any:
    """Tensors of dataclasses of dataclasses."""
    if isinstance(made, torch.Tensor):
        return made.to(DEVICE)
    if not is_dataclass(made):
        return made
    return replace(made, **{field.name: on_device(getattr(made, field.name)) for field in fields(made)})


def test_rows_of_neurons_that_are_out_are_not_read():
    weights, x = on_device(nested(64, 48, 8, 4)), inputs(1, d=64)
    wanted = nested_ffn(x, weights, 0.2, 0.4)
    scores = products(x, weights, fine=False)[0].abs() * weights.copy.norms
    assert 0 < (scores <= 0.2).sum() < (scores <= 0.4).sum() < 48
    for codes, limit in ((weights.down.upper, 0.2), (weights.down.lower, 0.4), (weights.up_lower, 0.4)):
        codes.data[scores <= limit] ^= 255
    weights.down.scales[scores <= 0.2] = torch.nan
    assert torch.equal(nested_ffn(x, weights, 0.2, 0.4), wanted)


def test_rows_of_a_fused_matrix_and_strided_inputs():
    w = make()
    fused = torch.cat([w.gate, w.up], dim=1)
    views = replace(w, gate=fused[:, :D], up=fused[:, D:])
    x = inputs(3)
    wide_x, wide_mask = torch.cat([x, x], 1)[:, D:], masks(3).T.contiguous().T
    assert torch.equal(sparse_ffn(wide_x, views, wide_mask), sparse_ffn(x, w, masks(3)))


def test_refusals_name_the_way_out():
    w, x = make(), inputs(2)
    transposed = replace(w, down=w.down.T.contiguous().T)
    for bad_x, bad_w, mask, message in [
        (x, transposed, None, r"weights.down has strides .*contiguous"),
        (x.half(), w, None, r"float32 and x_TD torch.float16; convert"),
        (x.double(), w, None, "take float32"),
        (x[:, 1:], w, None, r"give \[tokens, 40\]"),
        (x, replace(w, activation="mish"), None, "'mish' is unknown"),
        (x, w, torch.ones(2, 7, device=DEVICE), "60 neurons do not divide into 7 experts"),
        (x, w, torch.ones(3, 5, device=DEVICE), r"shape \[3, 5\]; \[2, 5\]"),
        (x.clone().requires_grad_(), w, None, "torch.no_grad"),
    ]:
        with pytest.raises(LTEError, match=message):
            sparse_ffn(bad_x, bad_w, mask)


def test_tuned_tiles_are_kept_and_used(tmp_path, monkeypatch):
    monkeypatch.setenv("LTE_CACHE_DIR", str(tmp_path))
    w, x, mask = make(), inputs(1), masks(1)
    gpu, problem = launch.current_gpu(x.device), launch.problem_of(x, w, mask)
    default = configs.config_for(gpu, problem)
    assert default in configs.candidates(gpu, problem)
    tuned = replace(default, hidden_rows=2, down_cols=16, down_rows=8, down_stages=1)
    configs.remember(gpu, problem, tuned)
    assert configs.config_for(gpu, problem) == tuned
    assert configs.config_for(gpu, replace(problem, n_tokens=2)) == configs.default_config(
        gpu, replace(problem, n_tokens=2)
    )
    assert_matches(x, w, mask)
    configs._tuned.cache_clear()
    assert configs.config_for(gpu, problem) == tuned
    configs.cache_file().write_text("{")
    configs._tuned.cache_clear()
    with pytest.warns(UserWarning, match=r"triton\.json is not a table"):
        assert configs.config_for(gpu, problem) == default
    configs._tuned.cache_clear()


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("n_tokens", [1, 5, 40])
def test_one_cuda_graph_serves_every_number_of_active_experts(n_tokens):
    w, x, mask = (
        make(dtype=torch.bfloat16, d=256, n=32, e=16),
        inputs(n_tokens, torch.bfloat16, 256),
        masks(n_tokens, 16),
    )
    sparse_ffn(x, w, mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sparse_ffn(x, w, mask)
    for share in (0.0, 0.1, 0.5, 1.0):
        mask.copy_(masks(n_tokens, 16, share))
        graph.replay()
        assert torch.equal(out, sparse_ffn(x, w, mask))


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("n_tokens", [1, 5])
def test_autotune(n_tokens, tmp_path, monkeypatch):
    monkeypatch.setenv("LTE_CACHE_DIR", str(tmp_path))
    w, x, mask = (
        make(dtype=torch.bfloat16, d=256, n=32, e=16),
        inputs(n_tokens, torch.bfloat16, 256),
        masks(n_tokens, 16),
    )
    best = autotune(x, w, mask, repeats=3)
    gpu, problem = launch.current_gpu(x.device), launch.problem_of(x, w, mask)
    assert configs.config_for(gpu, problem) == best
    assert_matches(x, w, mask)
    pdl = replace(configs.default_config(gpu, problem), pdl=gpu.capability >= (9, 0))
    configs.remember(gpu, problem, pdl)
    assert_matches(x, w, mask)
