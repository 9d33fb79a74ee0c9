from __future__ import annotations

import copy

import pytest
import torch

import lte
from lte.nn import SparsityMeter, observe_routing, set_mode, sparse_ffns, unsaid
from lte.ops import cpu, sparse_ffn_reference
from tests import models

NAMES = ["llama", "llama-bias-relu", "phi3", "opt", "gpt2", "gpt_neox", "bert"]


def ffn_of(name: str):
    model = lte.sparsify(models.build(name), lte.LTEConfig(expert_size=8, grouping="random", router_init="random"))
    models.spread_routers(model)
    return model, sparse_ffns(model)[0]


@pytest.mark.parametrize("name", NAMES)
def test_soft_mode_weighs_experts_by_their_scores(name):
    """Equation 2 of the paper, written out expert by expert."""
    _, ffn = ffn_of(name)
    ffn.mode = "soft"
    x = torch.randn(5, models.D_MODEL)
    weights, scores = ffn.weights(), ffn.router(x).scores
    dense_bias = 0.0 if weights.down_bias is None else weights.down_bias
    expected = torch.zeros(5, models.D_MODEL) + dense_bias
    for expert in range(8):
        only = torch.zeros(5, 8, dtype=torch.bool)
        only[:, expert] = True
        expected = expected + scores[:, expert : expert + 1] * (sparse_ffn_reference(x, weights, only) - dense_bias)
    torch.testing.assert_close(ffn(x), expected, atol=1e-5, rtol=1e-5)


def test_scores_never_scale_the_output_in_hard_mode():
    _, ffn = ffn_of("llama")
    x = torch.randn(5, models.D_MODEL)
    before = ffn(x)
    with torch.no_grad():
        ffn.router.weight.mul_(3.0)  # other scores, on the same side of the threshold
    assert torch.equal(ffn(x), before)


def test_no_expert_active_gives_the_down_bias():
    for name in ("gpt2", "opt", "llama"):
        _, ffn = ffn_of(name)
        with torch.no_grad():
            ffn.router.weight.zero_()
            ffn.router.bias.fill_(-5.0)
        bias = ffn.weights().down_bias
        expected = torch.zeros(3, models.D_MODEL) if bias is None else bias.expand(3, -1)
        torch.testing.assert_close(ffn(torch.randn(3, models.D_MODEL)), expected)


def test_a_masked_expert_that_overflows_does_no_harm():
    weights = ffn_of("llama")[1].weights()
    with torch.no_grad():
        weights.up[:8] = float("inf")
    mask = torch.ones(1, 8, dtype=torch.bool)
    mask[0, 0] = False
    assert torch.isfinite(sparse_ffn_reference(torch.ones(1, models.D_MODEL), weights, mask)).all()


def test_a_copy_is_independent():
    """The split families hold a module outside the registry; a deep copy must follow it."""
    model, _ = ffn_of("opt")
    copied = copy.deepcopy(model)
    expected = model(**models.inputs()).logits
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(model(**models.inputs()).logits, expected)
    assert copied(**models.inputs()).logits.abs().sum() == 0


def test_no_gradient_reaches_the_router_in_hard_mode():
    model, ffn = ffn_of("llama")
    ffn(torch.randn(3, models.D_MODEL)).sum().backward()
    assert ffn.router.weight.grad is None
    set_mode(model, "soft")
    ffn(torch.randn(3, models.D_MODEL)).sum().backward()
    assert ffn.router.weight.grad is not None


def test_meter_counts_marked_tokens_only():
    model, _ = ffn_of("llama")
    meter = SparsityMeter(models.LAYERS, bins=4)
    seen = []
    batch = models.inputs(2, 6)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 2:] = False
    with (
        torch.no_grad(),
        observe_routing(model, lambda layer, routing: (seen.append(routing.mask), meter(layer, routing))),
    ):
        model(**batch)
        meter.set_token_mask(mask)
        model(**batch)
    expected = [1 - float(m[mask].float().mean()) for m in seen[models.LAYERS :]]
    assert meter.per_layer == pytest.approx(expected)
    assert meter.overall == pytest.approx(sum(expected) / models.LAYERS)
    assert meter.histogram.sum(1).tolist() == [8 * 8.0] * models.LAYERS
    assert all(ffn.observer is None for ffn in sparse_ffns(model))


def test_no_mask_is_all_tokens_and_false_is_none():
    """As it is wherever a token mask is taken."""
    model, _ = ffn_of("llama")
    batch, every, none = models.inputs(2, 6), SparsityMeter(models.LAYERS), SparsityMeter(models.LAYERS)
    marked = SparsityMeter(models.LAYERS)
    for meter, mask in ((every, None), (none, False), (marked, torch.ones(2, 6, dtype=torch.bool))):
        meter.set_token_mask(mask)
        with torch.no_grad(), observe_routing(model, meter):
            model(**batch)
    assert every.per_layer == marked.per_layer
    assert not none.seen.any()


def test_padding_does_not_change_the_routing_of_real_tokens():
    """A batch of two with left padding gives each row what it gets alone."""
    model, _ = ffn_of("llama")
    long, short = models.inputs(1, 9)["input_ids"], models.inputs(1, 5, seed=2)["input_ids"]
    ids = torch.cat([long, torch.cat([torch.zeros(1, 4, dtype=torch.long), short], dim=1)])
    attention = torch.ones_like(ids)
    attention[1, :4] = 0
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        batched = model(input_ids=ids, attention_mask=attention, position_ids=positions).logits
        alone = model(input_ids=short).logits
    torch.testing.assert_close(batched[1, 4:], alone[0], atol=1e-4, rtol=1e-4)


def test_what_takes_the_slow_path_at_inference_says_why_once(caplog, monkeypatch):
    monkeypatch.setattr("lte.nn.ffn._said", set())
    model = lte.sparsify(models.build("llama"), lte.LTEConfig(expert_size=8, grouping="random", router_init="random"))
    model.eval()
    inputs, ffns = models.inputs(1, 4), sparse_ffns(model)
    with torch.no_grad():
        model(**inputs)
        assert not caplog.records
        handle = ffns[1].up_proj.register_forward_hook(lambda *_: None)
        for _ in range(2):
            model(**inputs)
        assert len(caplog.records) == 1
        assert "the FFN of layer 1 runs masked and dense, no faster than the dense" in caplog.text
        assert "its up_proj has hooks (accelerate puts them there under device_map, and tools" in caplog.text
        caplog.clear()
        lte.prepare_for_inference(model)
        assert "the FFNs of layers 1 will not run through the kernels: its up_proj has hooks" in caplog.text
        handle.remove()
        caplog.clear()
        lte.prepare_for_inference(model)
        with torch.autocast("cpu", torch.bfloat16):
            model(**inputs)
        assert "layer 0 runs masked and dense, no faster than the dense model: autocast is on" in caplog.text
    caplog.clear()
    model = lte.sparsify(models.build("llama"), lte.LTEConfig(expert_size=8, grouping="random", router_init="random"))
    model.train()
    model(**inputs)
    model.eval()
    with torch.no_grad():
        with unsaid():
            model(**inputs)
        assert not caplog.records  # a model that is being trained is looked at like this
        for _ in range(2):
            model(**inputs)
        if cpu.unavailable():
            assert not caplog.records
        else:
            assert len(caplog.records) == 1
            assert "layer 0 runs masked and dense" in caplog.text
            assert "trained in this process; lte.prepare_for_inference(model)" in caplog.text
        caplog.clear()
        lte.prepare_for_inference(model)
        model(**inputs)
        assert not caplog.records


@pytest.mark.parametrize("kind", ["lte", "self-prediction", "int4", "prepared"])
def test_a_model_on_the_meta_device_is_one_of_shapes(kind):
    model = models.build("llama")
    if kind in ("self-prediction", "int4"):
        lte.sparsify(model, lte.SelfPredictionConfig(group=32), calibration=[models.inputs(2, 8)])
    else:
        lte.sparsify(model, lte.LTEConfig(expert_size=8, grouping="random", router_init="random"))
    if kind == "int4":
        lte.quantize(model, bits=4)
    model.eval().to("meta")
    if kind == "prepared":
        lte.prepare_for_inference(model)
    ids = torch.zeros(2, 3, dtype=torch.long, device="meta")
    with torch.no_grad():
        assert model(input_ids=ids).logits.shape == (2, 3, models.VOCAB)


def test_preparing_does_not_report_success_where_something_hinders_it(caplog):
    caplog.set_level("INFO", logger="lte")
    model = lte.sparsify(models.build("llama"), lte.LTEConfig(expert_size=8, grouping="random", router_init="random"))
    handles = [ffn.up_proj.register_forward_hook(lambda *_: None) for ffn in sparse_ffns(model)]
    lte.prepare_for_inference(model)
    assert "the FFNs of layers 0, 1 will not run through the kernels" in caplog.text
    assert "one fused step" not in caplog.text
    for handle in handles:
        handle.remove()
    lte.prepare_for_inference(model)
    assert cpu.unavailable() or "decode runs as one fused step per token" in caplog.text
