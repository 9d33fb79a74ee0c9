"""The sparse FFN operator: every implementation against the float32 reference."""

from __future__ import annotations

import copy
import dataclasses
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lte.errors import BackendError, ConfigError, LTEError
from lte.ops import (
    ACTIVATIONS,
    FFNCopy,
    FFNWeights,
    copied_ffn,
    cpu,
    linear,
    route,
    routed_ffn,
    sparse_ffn,
    sparse_ffn_reference,
)
from lte.ops.backends import choose
from lte.ops.cpu.library import open_library
from lte.ops.lowbit import quantize, round_inputs

CSRC = Path(__file__).parents[2] / "csrc"

# Relative to the largest value of the reference. bf16 rounds the result to 8 bits; sums are float32 in either case.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3}  # what enters the down projection is of that dtype, too
needs_kernels = pytest.mark.skipif(bool(cpu.unavailable()), reason=cpu.unavailable() or "kernels built")


def make(
    d_model: int = 40,
    d_ff: int = 60,
    *,
    dtype: torch.dtype = torch.float32,
    activation: str = "silu",
    gated: bool = True,
    biases: bool = False,
    seed: int = 0,
) -> FFNWeights:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    return FFNWeights(
        up=draw(d_ff, d_model),
        down=draw(d_ff, d_model),
        gate=draw(d_ff, d_model) if gated else None,
        up_bias=draw(d_ff) if biases else None,
        gate_bias=draw(d_ff) if biases and gated else None,
        down_bias=draw(d_model) if biases else None,
        activation=activation,
    )


def assert_matches(got: Tensor, x: Tensor, weights: FFNWeights, expert_weights: Tensor | None) -> None:
    wanted = sparse_ffn_reference(x.float(), weights.float(), expert_weights)
    assert got.shape == x.shape
    assert got.dtype == x.dtype
    if wanted.numel():
        error = (got.float() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-3)
        assert error < TOLERANCE[x.dtype], float(error)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernels_match_the_reference(isa, activation, gated, dtype):
    weights = make(dtype=dtype, activation=activation, gated=gated, biases=True)
    for tokens in (1, 3, 17):
        x = torch.randn(tokens, 40, generator=torch.Generator().manual_seed(tokens)).to(dtype)
        mask = torch.rand(tokens, 5, generator=torch.Generator().manual_seed(9)) > 0.5
        assert_matches(sparse_ffn(x, weights, mask, impl="cpu"), x, weights, mask)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 16, 64, 70])
@pytest.mark.parametrize(
    ("d_model", "d_ff", "n_experts"),
    [(64, 128, 4), (33, 77, 7), (130, 36, 36), (8, 12, 1), (40, 600, 600), (24, 1200, 400)],
)
def test_odd_sizes_and_any_number_of_tokens(isa, d_model, d_ff, n_experts, tokens, dtype):
    weights = make(d_model, d_ff, dtype=dtype)
    x = torch.randn(tokens, d_model).to(dtype)
    mask = torch.rand(tokens, n_experts) > 0.6
    assert_matches(sparse_ffn(x, weights, mask, impl="cpu"), x, weights, mask)


@needs_kernels
@pytest.mark.parametrize("tokens", [1, 4, 9])
def test_no_expert_gives_the_bias_and_all_give_the_dense_network(tokens):
    weights, x = make(biases=True), torch.randn(tokens, 40)
    none = sparse_ffn(x, weights, torch.zeros(tokens, 5, dtype=torch.bool), impl="cpu")
    assert torch.equal(none, weights.down_bias.expand(tokens, 40))
    for everything in (torch.ones(tokens, 5, dtype=torch.bool), None):
        assert_matches(sparse_ffn(x, weights, everything, impl="cpu"), x, weights, None)


@needs_kernels
def test_float_weights_scale_experts_and_zero_leaves_them_out():
    weights, x = make(), torch.randn(3, 40)
    scale = torch.tensor([[0.5, 0, 2, 0, 1], [0, 0, 0, 0, 0], [1, 1, 0.25, 0, 0]])
    assert_matches(sparse_ffn(x, weights, scale, impl="cpu"), x, weights, scale)


@needs_kernels
def test_experts_left_out_are_never_read():
    weights, x = make(d_ff=60), torch.randn(2, 40)
    for matrix in (weights.up, weights.gate, weights.down):
        matrix[12:24] = float("nan")
    mask = torch.tensor([[True, False, True, False, True], [False, False, True, True, True]])
    clean = make(d_ff=60)
    assert_matches(sparse_ffn(x, weights, mask, impl="cpu"), x, clean, mask)


@needs_kernels
def test_memory_is_not_assumed_to_be_clean(monkeypatch):
    weights, x = make(biases=True), torch.randn(6, 40)
    mask = torch.rand(6, 5) > 0.5
    real = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda t: real(t).fill_(float("nan")))
    assert_matches(sparse_ffn(x, weights, mask, impl="cpu"), x, weights, mask)
    # The kernels' own buffers still hold a larger call's values.
    sparse_ffn(torch.full((64, 40), float("nan")), weights, None, impl="cpu")
    assert_matches(sparse_ffn(x, weights, mask, impl="cpu"), x, weights, mask)


@needs_kernels
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_may_lie_apart(dtype):
    """A fused gate-and-up projection, and every second row of a wider matrix."""
    both = torch.randn(120, 40).to(dtype) / 6
    wide = torch.randn(120, 96).to(dtype) / 6
    gate, up = both.chunk(2)
    weights, x = FFNWeights(up=up, down=wide[::2, :40], gate=gate), torch.randn(4, 40).to(dtype)
    mask = torch.rand(4, 5) > 0.5
    assert_matches(sparse_ffn(x, weights, mask, impl="cpu"), x, weights, mask)


@needs_kernels
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [1, 4, 6, 40])
def test_the_result_does_not_depend_on_the_number_of_threads_or_on_the_run(tokens, dtype):
    weights, x = make(512, 640, dtype=dtype), torch.randn(tokens, 512).to(dtype)
    mask = torch.rand(tokens, 20) > 0.4
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(sparse_ffn(x, weights, mask, impl="cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("router_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_router_is_the_routers_mask(impl, dtype, tokens, router_dtype):
    if impl == "cpu" and cpu.unavailable():
        pytest.skip(cpu.unavailable())
    torch.manual_seed(0)
    weights, x = make(dtype=dtype), torch.randn(tokens, 40).to(dtype)
    weight, bias = torch.randn(5, 40).to(router_dtype), torch.zeros(5).to(router_dtype)
    mask = route(x, weight, bias) > 0.6
    assert 0 < mask.float().mean() < 1
    got = routed_ffn(x, weight, bias, 0.6, weights, impl=impl)
    assert torch.equal(got, sparse_ffn(x, weights, mask, impl=impl))
    assert torch.equal(
        routed_ffn(x, weight, None, 0.6, weights, impl=impl),
        sparse_ffn(x, weights, route(x, weight, None) > 0.6, impl=impl),
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 17, 64])
@pytest.mark.parametrize(("d_model", "d_ff", "n_experts"), [(64, 320, 10), (33, 77, 11), (130, 72, 36)])
def test_a_float32_router_is_fused_beside_weights_of_any_dtype(
    isa, d_model, d_ff, n_experts, tokens, dtype, monkeypatch
):
    """Its scores are float32's own: bf16 could not tell the two sides of the threshold apart."""
    generator = torch.Generator().manual_seed(0)
    weights, x = make(d_model, d_ff, dtype=dtype), torch.randn(tokens, d_model, generator=generator).to(dtype)
    weight, bias = torch.randn(n_experts, d_model, generator=generator), torch.zeros(n_experts)
    # One token's logits end 1e-4 beside the threshold, on alternating sides.
    side = torch.tensor([1e-4, -1e-4]).repeat(n_experts)[:n_experts]
    bias = side - torch.nn.functional.linear(x[:1].float(), weight)[0]
    mask = route(x, weight, bias) > 0.5
    assert mask[0].tolist() == (side > 0).tolist()
    wanted = sparse_ffn(x, weights, mask, impl="cpu")
    monkeypatch.setattr("lte.ops.operator.route", lambda *_: pytest.fail("the router ran by itself"))
    for _ in range(2):  # the long way, and the one remembered
        assert torch.equal(routed_ffn(x, weight, bias, 0.5, weights, impl="cpu"), wanted)


@needs_kernels
def test_what_is_remembered_between_calls_is_never_another_calls():
    """The second call with the same tensors takes a short way, which must notice whatever has changed."""
    x, weight, bias = torch.randn(3, 40), torch.randn(5, 40), torch.zeros(5)
    weights = make(biases=True)

    def check(weights: FFNWeights, x: Tensor, weight: Tensor, bias: Tensor | None, threshold: float) -> None:
        got = routed_ffn(x, weight, bias, threshold, weights, impl="cpu")
        assert_matches(got, x, weights, route(x, weight, bias) > threshold)

    for _ in range(2):
        check(weights, x, weight, bias, 0.5)
    assert weights.prepared
    check(weights, x, weight, bias, 0.7)
    check(weights, x, weight, None, 0.7)
    check(weights, x, torch.randn(10, 40), None, 0.7)
    check(weights, torch.randn(40, 3).T, weight, bias, 0.5)
    check(weights, torch.randn(0, 40), weight, bias, 0.5)
    bias += 1
    check(weights, x, weight, bias, 0.5)
    weights.up.data = torch.randn(60, 40)
    check(weights, x, weight, bias, 0.5)
    check(copy.deepcopy(weights), x, weight, bias, 0.5)
    with pytest.raises(ConfigError, match="x has shape"):
        routed_ffn(x[0], weight, bias, 0.5, weights, impl="cpu")


@needs_kernels
def test_above_the_density_the_dense_path_runs(monkeypatch):
    weights, x = make(), torch.randn(2, 40)
    half = torch.tensor([[True, False, True, False, False]] * 2)
    called = []
    monkeypatch.setattr("lte.ops.operator.cpu.sparse_ffn", lambda *args: called.append(args) or x)
    sparse_ffn(x, weights, half, impl="cpu", max_density=0.5)
    assert len(called) == 1
    got = sparse_ffn(x, weights, half, impl="cpu", max_density=0.3)
    assert len(called) == 1
    assert_matches(got, x, weights, half)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 3, 16])
@pytest.mark.parametrize(("n_in", "n_out"), [(64, 64), (37, 70), (128, 9)])
def test_linear_is_a_linear_layer(isa, n_in, n_out, tokens, dtype):
    x, weight, bias = (
        torch.randn(tokens, n_in).to(dtype),
        torch.randn(n_out, n_in).to(dtype),
        torch.randn(n_out).to(dtype),
    )
    for b in (bias, None):
        wanted = torch.nn.functional.linear(x.float(), weight.float(), None if b is None else b.float())
        torch.testing.assert_close(
            linear(x, weight, b).float(),
            wanted,
            rtol=1e-2 if dtype == torch.bfloat16 else 1e-5,
            atol=1e-5 if dtype == torch.float32 else 2e-2,
        )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_opcheck(impl, dtype):
    weights, x = make(dtype=dtype, biases=True), torch.randn(3, 40).to(dtype)
    mask, router = torch.rand(3, 5) > 0.5, torch.randn(5, 40)
    tensors = (weights.up, weights.down, weights.gate, weights.up_bias, weights.gate_bias, weights.down_bias)
    tail = (*tensors, weights.activation, impl, 1.0)
    torch.library.opcheck(torch.ops.lte.sparse_ffn.default, (x, mask, *tail))
    torch.library.opcheck(torch.ops.lte.routed_ffn.default, (x, router, None, 0.5, *tail))
    torch.library.opcheck(torch.ops.lte.linear.default, (x, weights.up, weights.up_bias))
    copies = [quantize(matrix, 3, 32) for matrix in (weights.up, weights.gate)]
    copy = (weights.down.float().norm(dim=1), *([made.planes, made.scales] for made in copies), copies[0].columns, 60)
    torch.library.opcheck(torch.ops.lte.copied_ffn.default, (x, *copy, 0.1, *tail))
    torch.library.opcheck(torch.ops.lte.copy_scores.default, (x, *copy, *tail))


@pytest.mark.slow
def test_compiles_without_a_graph_break():
    weights, router = make(64, 64), torch.randn(4, 64)

    def step(x: Tensor) -> Tensor:
        return (
            x + routed_ffn(torch.nn.functional.layer_norm(x, (64,)), router, None, 0.5, weights) + linear(x, weights.up)
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for tokens in (2, 5, 9):
        x = torch.randn(tokens, 64)
        torch.testing.assert_close(compiled(x), step(x), rtol=1e-4, atol=1e-5)


def test_errors_name_the_thing_the_value_and_the_way_out(monkeypatch):
    weights, x = make(), torch.randn(2, 40)
    with pytest.raises(ConfigError, match=r"x has shape \[2, 39\]; wanted \[tokens, 40\]"):
        sparse_ffn(x[:, :39], weights)
    with pytest.raises(ConfigError, match="7 experts do not divide d_ff=60"):
        sparse_ffn(x, weights, torch.ones(2, 7, dtype=torch.bool))
    with pytest.raises(ConfigError, match=r"expert_weights has shape \[3, 5\]; wanted \[2,"):
        sparse_ffn(x, weights, torch.ones(3, 5, dtype=torch.bool))
    with pytest.raises(
        BackendError, match="impl='gpu' is no backend; choose one of auto, fastest, reference, cpu, triton"
    ):
        sparse_ffn(x, weights, impl="gpu")
    monkeypatch.setenv("LTE_BACKEND", "fast")
    with pytest.raises(BackendError, match="LTE_BACKEND='fast' is no backend"):
        sparse_ffn(x, weights)
    with pytest.raises(LTEError, match="tensors are on cpu"):
        sparse_ffn(x, weights, impl="triton")
    with pytest.raises(ConfigError, match="activation 'swiglu' is unknown; choose one of relu"):
        sparse_ffn(x, make(activation="swiglu"))


@needs_kernels
def test_an_implementation_asked_for_never_gives_way_to_another():
    packed, x = make(), torch.randn(2, 40)
    stock = FFNWeights(up=packed.up, down=packed.down.T.contiguous().T, gate=packed.gate)
    with pytest.raises(
        BackendError, match="row of the down matrix is not contiguous; lte.prepare_for_inference packs it"
    ):
        sparse_ffn(x, stock, impl="cpu")
    with pytest.raises(BackendError, match="dtypes are float32 and bfloat16, not float16"):
        sparse_ffn(x.half(), make(dtype=torch.float16), impl="cpu")
    assert_matches(sparse_ffn(x, stock), x, packed, None)


@needs_kernels
def test_the_environment_chooses_for_auto_alone(monkeypatch):
    weights, x = make(), torch.randn(2, 40)
    assert choose("auto", x, weights) == "cpu"
    monkeypatch.setenv("LTE_BACKEND", "reference")
    assert choose("auto", x, weights) == "reference"
    assert choose("cpu", x, weights) == "cpu"


@pytest.mark.slow
@pytest.mark.skipif(not (CSRC.is_dir() and shutil.which("g++")), reason="needs the sources and g++")
def test_the_avx512_bf16_code_computes_the_same(tmp_path, monkeypatch):
    """On processors without AVX-512 its code is compiled with the dot product instruction written out."""
    target = tmp_path / "_kernels.so"
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-w", "-DLTE_EMULATE_AVX512", "-DLTE_VARIANT=lte_generic"]
    sources = [str(CSRC / name) for name in ("kernels.cpp", "api.cpp", "threads.cpp")]
    subprocess.run(["g++", *flags, *sources, "-o", str(target), "-ldl"], check=True)
    opened = open_library(target)
    assert opened[0] is not None, opened[1]
    monkeypatch.setattr("lte.ops.cpu.library._open", lambda: opened)
    for dtype in TOLERANCE:
        for d_model, d_ff, n_experts in ((64, 128, 4), (33, 77, 7), (130, 36, 36)):
            weights = make(d_model, d_ff, dtype=dtype, biases=True)
            for tokens in (1, 2, 5, 16):
                x, mask = torch.randn(tokens, d_model).to(dtype), torch.rand(tokens, n_experts) > 0.5
                assert_matches(sparse_ffn(x, weights, mask, impl="cpu"), x, weights, mask)
                router = torch.randn(n_experts, d_model)
                chosen = sparse_ffn(x, weights, route(x, router, None) > 0.5, impl="cpu")
                assert torch.equal(routed_ffn(x, router, None, 0.5, weights, impl="cpu"), chosen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down": torch.zeros(40, 60)}, r"the down matrix has shape \[40, 60\]; wanted \[60, 40\]"),
        ({"gate": torch.zeros(48, 40)}, "the gate matrix has shape"),
        ({"up_bias": torch.zeros(8)}, r"the up bias has shape \[8\]; wanted \[60\]"),
        ({"down_bias": torch.zeros(60)}, r"the down bias has shape \[60\]; wanted \[40\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message):
    weights, x = dataclasses.replace(make(biases=True), **change), torch.randn(2, 40)
    with pytest.raises(ConfigError, match=message):
        sparse_ffn(x, weights, torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ConfigError, match=message):
        routed_ffn(x, torch.zeros(5, 40), None, 0.5, weights)


def test_routers_and_linear_layers_that_do_not_fit_are_refused():
    weights, x = make(), torch.randn(2, 40)
    with pytest.raises(ConfigError, match=r"the router weight has shape \[5, 39\]; wanted \[experts, 40\]"):
        routed_ffn(x, torch.zeros(5, 39), None, 0.5, weights)
    with pytest.raises(ConfigError, match=r"the router bias has shape \[1\]; wanted \[5\]"):
        routed_ffn(x, torch.zeros(5, 40), torch.zeros(1), 0.5, weights)
    with pytest.raises(ConfigError, match=r"x has shape \[2, 40\]; wanted \[tokens, 48\]"):
        linear(x, torch.zeros(8, 48))
    with pytest.raises(ConfigError, match=r"the bias has shape \[7\]; wanted \[8\]"):
        linear(x, torch.zeros(8, 40), torch.zeros(7))


@needs_kernels
def test_biases_of_another_kind_are_not_read_as_they_lie():
    x, weight, bias = torch.randn(2, 40), torch.randn(5, 40), torch.randn(5)
    weights = make(biases=True)
    wanted = routed_ffn(x, weight, bias, 0.5, weights, impl="cpu")
    assert torch.equal(routed_ffn(x, weight, bias.double(), 0.5, weights, impl="cpu"), wanted)
    assert torch.equal(routed_ffn(x, weight, bias.repeat(2, 1).T[:, 0], 0.5, weights, impl="cpu"), wanted)
    strided = dataclasses.replace(weights, up_bias=torch.randn(60, 2)[:, 0])
    with pytest.raises(BackendError, match="the up bias is torch.float32 with stride"):
        sparse_ffn(x, strided, None, impl="cpu")
    torch.testing.assert_close(linear(x, weight, bias.repeat(2, 1).T[:, 0]), linear(x, weight, bias))


def copy_scores(x: Tensor, made: FFNCopy, n_experts: int, weights: FFNWeights) -> Tensor:
    """Norm of every expert's output by the copy, in float32: [T, E]."""
    x, act = round_inputs(x, made.up.group), ACTIVATIONS[weights.activation]
    biases = [None if bias is None else bias.float() for bias in (weights.gate_bias, weights.up_bias)]
    up = torch.nn.functional.linear(x, made.up.dequantize(), biases[1])
    gate = None if made.gate is None else torch.nn.functional.linear(x, made.gate.dequantize(), biases[0])
    up = act(up) if gate is None else act(gate) * up
    return (up * made.norms).unflatten(1, (n_experts, -1)).norm(dim=-1)


def between(scores: Tensor) -> float:
    """A cut in the widest gap between neighbouring scores, about where half of them are above."""
    ordered = scores.flatten().sort().values
    ordered = ordered[len(ordered) // 3 : 2 * len(ordered) // 3]
    widest = int((ordered[1:] / ordered[:-1].clamp_min(1e-12)).argmax())
    return float(ordered[widest] + ordered[widest + 1]) / 2


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("bits", "group"), [(1, 64), (2, 64), (3, 64), (4, 64), (3, 32), (2, 96)])
@pytest.mark.parametrize(
    ("d_model", "d_ff", "n_experts", "gated"),
    [(64, 300, 300, True), (200, 70, 70, True), (100, 96, 24, True), (130, 90, 90, False), (72, 600, 12, False)],
)
def test_an_ffn_is_routed_by_its_own_copy(isa, d_model, d_ff, n_experts, gated, bits, group, dtype):
    activation = "silu" if gated else "gelu"
    weights = make(d_model, d_ff, dtype=dtype, gated=gated, activation=activation, biases=d_ff < 100)
    gate = None if weights.gate is None else quantize(weights.gate, bits, group)
    made = FFNCopy(quantize(weights.up, bits, group), weights.down.float().norm(dim=1), gate)
    for tokens in (1, 2, 4, 7):
        x = torch.randn(tokens, d_model, generator=torch.Generator().manual_seed(tokens)).to(dtype)
        scores = copy_scores(x, made, n_experts, weights)
        cut = between(scores)
        mask = scores > cut
        assert 0.2 < mask.float().mean() < 0.8
        wanted = sparse_ffn(x, weights, mask, impl="cpu")
        assert torch.equal(copied_ffn(x, made, cut, n_experts, weights), wanted)


def test_kernels_without_torchs_threads_say_so(caplog, monkeypatch):
    from lte.ops.cpu import library

    library._open.cache_clear()
    monkeypatch.setattr(library, "open_library", lambda path: (SimpleNamespace(lte_shares_threads=lambda: 0), ""))
    monkeypatch.setattr(library.Path, "glob", lambda self, pattern: [Path("_kernels.so")])
    library._open()
    library._open()
    monkeypatch.undo()
    library._open.cache_clear()
    assert [record.message for record in caplog.records] == [
        "the C++ kernels run on one thread: torch's OpenMP threads (libgomp) are not in this process"
    ]
