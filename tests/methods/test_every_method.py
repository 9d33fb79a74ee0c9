"""What every method must do, whatever decides."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import lte
from lte.accounting import model_cost
from lte.config import METHODS, method_config, sparsity_is
from lte.errors import ConfigError
from lte.inference.decode import DecodeStep
from lte.methods import teal
from lte.nn import SparseFFN, SparsityMeter, observe_routing, sparse_ffns
from lte.nn import ffn as ffn_module
from lte.ops import cpu
from tests import models

NAMES = sorted(name for name, (settings, _) in METHODS.items() if settings.__module__.startswith("lte."))
SMALL = {
    "bank-topk": {"bank": 16, "rank": 8},
    "dejavu": {"rank": 8},
    "moefication": {"rank": 8},
    "svd": {"rank": 8},
    "self-prediction": {"group": 32},
}


def made(method: str, family: str = "llama", **settings):
    kept = {"expert_size": models.EXPERT} if METHODS[method][0].model_fields["expert_size"].default > 1 else {}
    if sparsity_is(method) == "fixed share":
        kept["sparsity"] = 0.75
    config = method_config(method, {**kept, **SMALL.get(method, {}), **settings})
    batch = models.inputs(8, 16)
    labels = torch.arange(8) % 2 if family in models.ENCODERS else batch["input_ids"]
    return lte.sparsify(models.build(family), config, calibration=[{**batch, "labels": labels}]).eval()


def routed(model, batch):
    """Routings by layer, and the sparsity."""
    meter, kept = SparsityMeter(models.LAYERS), {}
    meter.set_token_mask(torch.ones_like(batch["input_ids"]).bool())

    def watch(layer, routing):
        kept[layer] = routing
        meter(layer, routing)

    with torch.no_grad(), observe_routing(model, watch):
        model(**batch)
    return kept, meter.overall


def first_inputs(model):
    """What the first sparse FFN sees of some tokens, [T, D]."""
    kept = []

    def keep(ffn, args):
        kept.append(args[0].flatten(0, 1))

    handle = sparse_ffns(model)[0].register_forward_pre_hook(keep)
    with torch.no_grad():
        model(**models.inputs(8, 16))
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("method", NAMES)
def test_it_reaches_a_sparsity_and_comes_back_from_disk(method, tmp_path):
    family, batch = "opt" if method == "sparseinfer" else "llama", models.inputs(4, 12)
    model = made(method, family)
    if sparsity_is(method) == "fixed share":
        assert routed(model, batch)[1] == pytest.approx(0.75, abs=0.03 if method == "teal" else 1e-6)
    elif sparsity_is(method) == "its own":
        assert routed(model, batch)[1] == 0 if method == "dense" else 0.3 < routed(model, batch)[1] < 0.7
    else:
        assert lte.calibrate(model, [batch], 0.6).sparsity == pytest.approx(0.6, abs=0.02)
    model.save_pretrained(tmp_path)
    loaded = lte.load(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch)[0], model(**batch)[0])
        lte.prepare_for_inference(loaded)
        torch.testing.assert_close(loaded(**batch)[0], model(**batch)[0], atol=1e-4, rtol=1e-3)
    assert {p.requires_grad for ffn in sparse_ffns(loaded) for p in ffn.router.parameters()} <= {
        any(p.requires_grad for p in sparse_ffns(model)[0].router.parameters())
    }


def refuses(method: str, family: str) -> bool:
    """Whether a method's rule has no meaning for a family."""
    if method == "sparseinfer":
        return family not in ("llama-bias-relu", "opt", "bert-relu")
    return method == "countdown" and family in ("gpt2", "gpt_neox", "opt", *models.ENCODERS)


@pytest.mark.parametrize("family", sorted(models.CONFIGS))
def test_every_method_serves_every_family_or_says_why_not(family, tmp_path):
    batch = models.inputs(4, 12)
    for method in NAMES:
        if refuses(method, family):
            with pytest.raises(ConfigError, match="gated" if method == "countdown" else "with a ReLU"):
                made(method, family)
            continue
        model = made(method, family)
        cost = model_cost(model)
        for count in (cost.gflops_per_token, cost.bytes_per_token):
            of = count([0.5] * models.LAYERS)
            assert 0 <= of["router"] < of["sparse"] < of["dense"] + of["router"], method
        model.save_pretrained(tmp_path / method)
        loaded = lte.load(tmp_path / method).eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(**batch)[0], model(**batch)[0])
        assert model_cost(loaded) == cost


@pytest.mark.skipif(bool(cpu.unavailable()), reason=cpu.unavailable() or "kernels built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", NAMES)
def test_its_decode_step_is_one_with_the_kernels(method, dtype, monkeypatch):
    family = "llama-bias-relu" if method == "sparseinfer" else "llama"
    plain = made(method, family).to(dtype)
    if sparsity_is(method) == "threshold" and method != "sparseinfer":  # whose counts leave gaps
        lte.calibrate(plain, [models.inputs(4, 12)], 0.6)
    fast = lte.prepare_for_inference(copy.deepcopy(plain), impl="cpu")
    for ffn in sparse_ffns(plain):
        ffn.choose_path = lambda tokens: ("reference", 1.0)
    prompt, token = models.inputs(3, 9), models.inputs(3, 1)["input_ids"]
    prompt["attention_mask"][1, :4] = 0
    mask = torch.cat([prompt["attention_mask"], torch.ones(3, 1, dtype=torch.int64)], 1)
    with torch.no_grad():
        caches = [plain(**prompt, use_cache=True).past_key_values for _ in range(2)]
        wanted = plain(input_ids=token, attention_mask=mask, past_key_values=caches[0]).logits.float()
        monkeypatch.setattr(SparseFFN, "forward", lambda *_: pytest.fail("a step ran module by module"))
        found = fast(input_ids=token, attention_mask=mask, past_key_values=caches[1]).logits.float()
    # In bf16 both round, at different places, and what is near a threshold may go the other way.
    assert (found - wanted).norm() < (1e-5 if dtype == torch.float32 else 0.05) * wanted.norm()


def test_single_zeros_stop_no_decode_step():
    fast = lte.prepare_for_inference(made("wanda"))
    assert not DecodeStep(fast).stops()


@pytest.mark.parametrize("method", NAMES)
def test_it_says_what_it_is(method):
    behaviour = METHODS[method][1]
    assert behaviour.decides
    assert METHODS[method][0].__doc__.strip()


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
def test_kla_keeps_the_k_largest_activations_of_every_token(family):
    model = made("kla", family, sparsity=0.9)
    ffn = sparse_ffns(model)[0]
    x = torch.randn(6, models.D_MODEL, generator=torch.Generator().manual_seed(0))
    mask, activations = ffn.router(x).mask, ffn.hidden(x).abs()
    k = round(0.1 * models.D_FF)
    assert mask.sum(-1).tolist() == [k] * 6
    for kept, row in zip(mask, activations, strict=True):
        assert row[kept].min() >= row[~kept].max()


def test_deja_vu_learns_which_activations_are_largest():
    ours, chance = made("dejavu", rank=32), made("dejavu", rank=32)
    generator = torch.Generator().manual_seed(1)
    for ffn in sparse_ffns(chance):
        ffn.router.reset_parameters(generator)
    hits = []
    for model in (ours, chance):
        ffn, x = sparse_ffns(model)[0], first_inputs(model)
        mask, k = ffn.router(x).mask, ffn.router.k
        best = ffn.hidden(x).abs().topk(k).indices
        hits.append(float(mask.gather(1, best).float().mean()))
        assert set(mask.sum(-1).tolist()) == {k}
    assert hits[0] > hits[1] + 0.2


def test_every_bank_keeps_as_many():
    router = sparse_ffns(made("bank-topk"))[0].router
    routing = router(torch.randn(5, models.D_MODEL))
    assert set(routing.mask.unflatten(-1, (-1, 16)).sum(-1).flatten().tolist()) == {4}
    assert routing.scores.requires_grad
    with pytest.raises(ConfigError, match="bank=24 does not divide the 64 experts"):
        made("bank-topk", bank=24)


def test_a_bank_keeps_those_with_the_largest_predictions():
    router = sparse_ffns(made("bank-topk"))[0].router.eval()
    routing = router(torch.randn(5, models.D_MODEL, generator=torch.Generator().manual_seed(0)))
    for mask, scores in zip(routing.mask, routing.scores, strict=True):
        for bank in range(0, models.D_FF, 16):
            best = sorted(range(bank, bank + 16), key=lambda neuron: -scores[neuron].item())[:4]
            assert {bank + i for i in mask[bank : bank + 16].nonzero().flatten().tolist()} == set(best)


def test_dsmoe_gates_neighbouring_pieces_by_a_sigmoid_and_learns_straight_through():
    before, model = models.build("llama"), made("dsmoe")
    ffn = sparse_ffns(model)[0]
    first = before.model.layers[0].mlp
    assert torch.equal(ffn.weights().up, first.up_proj.weight)  # neurons stay where they are
    x = torch.randn(6, models.D_MODEL, generator=torch.Generator().manual_seed(0))
    gates = torch.sigmoid(x @ ffn.router.weight.T + ffn.router.bias)
    lte.set_mode(model, "straight-through")
    kept = (gates > ffn.router.threshold).repeat_interleave(models.EXPERT, -1)
    torch.testing.assert_close(ffn(x), first.down_proj((first.act_fn(first.gate_proj(x)) * first.up_proj(x)) * kept))
    ffn(x).sum().backward()
    assert ffn.router.weight.grad.abs().sum(1).min() > 0  # pieces that did not run learn too


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_svd_is_the_best_of_its_rank_for_the_inputs_it_was_fitted_to(family):
    ffn = sparse_ffns(made("svd", family, rank=4))[0]
    x = torch.randn(400, models.D_MODEL, generator=torch.Generator().manual_seed(0)) @ torch.diag(
        torch.logspace(-1, 1, models.D_MODEL)
    )
    ffn.router.approximate(x)
    for name in ffn.router.names:
        matrix = getattr(ffn.weights(), name).detach()
        wanted = x @ matrix.T
        inner, outer = (ffn.router.get_parameter(f"{name}_{part}") for part in ("inner", "outer"))
        best = torch.linalg.svdvals(wanted)[4:].norm()  # Eckart and Young
        assert float((x @ inner.T @ outer.T - wanted).norm()) == pytest.approx(float(best), rel=0.01)
        plain = torch.linalg.svd(matrix)
        rough = plain.U[:, :4] * plain.S[:4] @ plain.Vh[:4]
        assert (x @ rough.T - wanted).norm() > 1.2 * best


@pytest.mark.parametrize("router", ["oracle", "mlp"])
def test_moefication_keeps_the_clusters_with_the_largest_sums(router):
    model = made("moefication", router=router, rank=32)
    ffn, x = sparse_ffns(model)[0], first_inputs(model)
    mask = ffn.router(x).mask
    sums = ffn.hidden(x).abs().unflatten(-1, (-1, models.EXPERT)).sum(-1)
    best = sums.topk(ffn.router.k).indices
    hits = float(mask.gather(1, best).float().mean())
    assert hits == 1 if router == "oracle" else hits > 0.25 + 0.15


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_cmoe_always_runs_what_is_active_most_often_and_asks_one_neuron_for_the_rest(family):
    before, model = models.build(family), made("cmoe", family, sparsity=0.5, expert_size=4)
    batch = models.inputs(8, 16)
    with torch.no_grad():
        lte.set_mode(model, "dense")
        torch.testing.assert_close(model(**batch)[0], before.eval()(**batch)[0])  # neurons are in another order alone
    ffn, x = sparse_ffns(model)[0], first_inputs(model)
    router, hidden = ffn.router, ffn.hidden(x).abs()
    active = torch.zeros_like(hidden, dtype=torch.bool).scatter_(1, hidden.topk(6).indices, True)  # 0.1 x 64
    often = active.sum(0)
    assert router.n_shared == 4
    assert often[:16].min() >= often[16:].max()
    mask = router(x).mask
    assert mask[:, :4].all()
    assert set(mask.sum(-1).tolist()) == {8}
    assert router.representatives.long().tolist() == sorted(router.representatives.long().tolist())
    voices = hidden[:, router.representatives.long()]
    assert torch.equal(mask[:, 4:].nonzero(), torch.zeros_like(voices).scatter_(1, voices.topk(4).indices, 1).nonzero())


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_teal_leaves_out_small_inputs_of_every_matrix(family):
    model = made("teal", family, sparsity=0.4)
    ffn, x = sparse_ffns(model)[0], first_inputs(model)
    tau_x, tau_h = ffn.router.taus.tolist()
    kept = x * (x.abs() > tau_x)
    hidden = ffn.hidden(kept)
    wanted = ffn.project_down(hidden * (hidden.abs() > tau_h))
    with torch.no_grad():
        torch.testing.assert_close(ffn(x), wanted, atol=1e-5, rtol=1e-4)
    of_down = float((hidden.abs() <= tau_h).float().mean())
    of_inputs = float((kept == 0).float().mean())
    before = 1 if family == "gpt2" else 2
    assert (before * of_inputs + of_down) / (before + 1) == pytest.approx(0.4, abs=0.01)
    assert routed(model, models.inputs(8, 16))[1] == pytest.approx(0.4, abs=0.03)


def test_teal_divides_a_budget_as_changes_the_output_least():
    divided, even = (sparse_ffns(made("teal", sparsity=0.6, divide=divide))[0] for divide in (True, False))
    _, ffn, x, hidden = dense_of_first()
    with torch.no_grad():
        wanted = ffn.project_down(hidden)
        errors = [float((each(x) - wanted).square().mean()) for each in (divided, even)]
        assert errors[0] < errors[1]
        for more in teal.DIVISIONS:  # by hand: no other division is better
            kept = x * (x.abs() > x.abs().flatten().kthvalue(round((0.6 - more / 2) * x.numel())).values)
            there = ffn.hidden(kept)
            small = there.abs().flatten().kthvalue(round((0.6 + more) * there.numel())).values
            assert float((ffn.project_down(there * (there.abs() > small)) - wanted).square().mean()) > errors[0] * 0.999


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("method", ["cats", "countdown", "relufication"])
def test_what_was_computed_to_decide_is_not_computed_again(method, family, monkeypatch):
    """Kernels get the known half, and give what the masked dense FFN does; bytes count two thirds of what runs."""
    model = made(method, family)
    if method != "relufication":
        lte.calibrate(model, [models.inputs(8, 16)], 0.6)
    batch, calls = models.inputs(1, 3), []
    _, sparsity = routed(model, batch)
    with torch.no_grad():
        wanted = model(**batch)[0]
        real = ffn_module.sparse_ffn
        monkeypatch.setattr(ffn_module, "sparse_ffn", lambda x, w, *a, **k: (calls.append(w), real(x, w, *a, **k))[1])
        fast = lte.prepare_for_inference(model, impl="cpu")
        torch.testing.assert_close(fast(**batch)[0], wanted, rtol=1e-3, atol=1e-4)
    assert len(calls) == models.LAYERS
    assert all(weights.gate is None for weights in calls)
    cost = model_cost(model)
    ffns = 3 * models.D_MODEL * models.D_FF * models.LAYERS * 4
    read = cost.bytes_per_token([sparsity] * models.LAYERS)
    assert read["dense"] - read["sparse"] == pytest.approx(ffns * sparsity * 2 / 3)


def test_wina_weighs_inputs_by_what_they_are_multiplied_with():
    model = made("wina", sparsity=0.5)
    ffn, x = sparse_ffns(model)[0], first_inputs(model)
    columns = torch.cat([ffn.gate_proj.weight, ffn.up_proj.weight]).norm(dim=0)
    best = (x.abs() * columns).topk(models.D_MODEL // 2).indices
    kept = torch.zeros_like(x).scatter_(1, best, 1.0) * x
    hidden = ffn.hidden(kept)
    rows = (hidden.abs() * ffn.down_proj.weight.norm(dim=0)).topk(models.D_FF // 2).indices
    wanted = ffn.project_down(torch.zeros_like(hidden).scatter_(1, rows, 1.0) * hidden)
    with torch.no_grad():
        torch.testing.assert_close(ffn(x), wanted, atol=1e-5, rtol=1e-4)


def test_a_random_router_is_drawn_from_the_seed_and_stays():
    one, other, third = made("random-router"), made("random-router"), made("random-router", seed=1)
    weights = [sparse_ffns(model)[0].router.weight for model in (one, other, third)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not weights[0].requires_grad
    torch.testing.assert_close(weights[0].norm(dim=1), torch.ones(len(weights[0])))


@pytest.mark.parametrize("direct", [False, True])
def test_countdown_goes_by_the_coefficient(direct):
    ffn = sparse_ffns(made("countdown", direct=direct))[0]
    x = torch.randn(5, models.D_MODEL, generator=torch.Generator().manual_seed(0))
    wanted = ffn.hidden(x).abs() if direct else ffn.up_proj(x).abs()
    torch.testing.assert_close(ffn.router.scores(x), wanted * ffn.router.sensitivity)
    with pytest.raises(ConfigError, match="method='countdown' is for gated FFNs"):
        made("countdown", "gpt2")


def test_sparseinfer_counts_signs():
    ffn = sparse_ffns(made("sparseinfer", "opt"))[0]
    x = torch.randn(5, models.D_MODEL, generator=torch.Generator().manual_seed(0))
    products = x[:, None] * ffn.weights().up[None]
    majority = (products > 0).sum(-1) > (products < 0).sum(-1)
    assert torch.equal(ffn.router(x).mask, majority)
    with pytest.raises(ConfigError, match="with a ReLU, and this model's have 'silu'"):
        made("sparseinfer", "llama")


def dense_of_first(family="llama"):
    """A dense model, its first FFN looking as those of sparse ones do, its inputs and what enters the last matrix."""
    model = made("kla", family)
    lte.set_mode(model, "dense")
    ffn, seen = sparse_ffns(model)[0], first_inputs(model)
    with torch.no_grad():
        return model, ffn, seen, ffn.hidden(seen)


def gradients_of_first(model):
    """Of the loss, with respect to what enters the first down projection, [T, F]."""
    kept = []
    batch = models.inputs(8, 16)
    handle = sparse_ffns(model)[0].down_proj.register_forward_pre_hook(
        lambda module, args: (args[0].retain_grad(), kept.append(args[0]))[0]
    )
    model(**batch, labels=batch["input_ids"]).loss.backward()
    handle.remove()
    return kept[0].grad.flatten(0, 1)


@pytest.mark.parametrize("rule", ["magnitude", "wanda", "taylor", "flap"])
def test_pruning_removes_what_counts_least(rule):
    model = made(f"prune-{rule}")
    dense, ffn, seen, hidden = dense_of_first()
    gate, up, down = (part.weight.detach() for part in (ffn.gate_proj, ffn.up_proj, ffn.down_proj))
    changes = hidden * gradients_of_first(dense)
    wanted = {
        "magnitude": [float((gate[i] ** 2).sum() + (up[i] ** 2).sum() + (down[:, i] ** 2).sum()) for i in range(64)],
        "wanda": [float(hidden[:, i].norm() * down[:, i].abs().sum()) for i in range(64)],
        "taylor": [float((changes[:, i] ** 2).mean()) for i in range(64)],
        "flap": [float(hidden[:, i].var() * down[:, i].norm() ** 2) for i in range(64)],
    }[rule]
    pruned = sparse_ffns(model)[0]
    kept = pruned.router.keeps.bool()
    order = torch.tensor(wanted).argsort(descending=True)
    assert set(order[: int(kept.sum())].tolist()) == set(kept.nonzero().flatten().tolist())
    shares = [int(ffn.router.keeps.sum()) for ffn in sparse_ffns(model)]
    assert sum(shares) == models.LAYERS * models.D_FF // 4
    assert rule == "flap" or set(shares) == {models.D_FF // 4}
    torch.testing.assert_close(pruned.up_proj.weight, up[kept])
    torch.testing.assert_close(pruned.down_proj.weight, down[:, kept])
    assert pruned.gate_proj.weight.shape == (pruned.gate_proj.out_features, models.D_MODEL) == (shares[0], 32)
    lost = (hidden.mean(0) * ~kept) @ down.T if rule == "flap" else 0.0
    with torch.no_grad():
        torch.testing.assert_close(pruned(seen), (hidden * kept) @ down.T + lost)


@pytest.mark.parametrize("family", sorted(models.CONFIGS))
@pytest.mark.parametrize("rule", ["wanda", "flap"])
def test_a_pruned_model_is_smaller_saved_loaded_and_run_by_kernels(family, rule, tmp_path):
    dense, model = models.build(family), made(f"prune-{rule}", family)
    batch = models.inputs(2, 9)
    per_neuron = sum(w is not None for w in (sparse_ffns(model)[0].weights().gate, 1, 1)) * models.D_MODEL
    biases = sum(p.numel() for name, p in model.named_parameters() if name.endswith(".bias"))
    removed = models.LAYERS * models.D_FF * 3 // 4
    count = [sum(p.numel() for n, p in each.named_parameters() if p.ndim > 1) for each in (dense, model)]
    assert count[0] - count[1] == removed * per_neuron
    costs = [model_cost(each) for each in (dense, model)]
    assert costs[1].gflops_per_token([0.75] * models.LAYERS)["dense"] == costs[0].gflops_per_token([])["dense"]
    _, sparsity = routed(model, batch)
    assert sparsity == pytest.approx(0.75)
    model.save_pretrained(tmp_path)
    loaded = lte.load(tmp_path)
    assert sum(p.numel() for name, p in loaded.named_parameters() if name.endswith(".bias")) == biases
    with torch.no_grad():
        wanted = model(**batch)[0]
        torch.testing.assert_close(loaded(**batch)[0], wanted)
        fast = lte.prepare_for_inference(loaded, impl="cpu")
        torch.testing.assert_close(fast(**batch)[0], wanted, rtol=1e-3, atol=1e-4)


def zeros_by_hand(scores, pattern):
    """Which weights stay: of every output's, half of all, or of every 4 or 8 in a row."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    of = scores.shape[1] if pattern == "unstructured" else int(pattern[-1])
    for row in range(len(scores)):
        for start in range(0, scores.shape[1], of):
            order = scores[row, start : start + of].argsort(descending=True)[: of // 2]
            kept[row, start + order] = True
    return kept


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_wanda_zeroes_what_counts_least_for_each_output(pattern, tmp_path):
    model = made("wanda", sparsity=0.5, pattern=pattern)
    _, ffn, seen, hidden = dense_of_first()
    found = sparse_ffns(model)[0]
    for name, inputs in {"gate_proj": seen, "up_proj": seen, "down_proj": hidden}.items():
        weight = getattr(ffn, name).weight.detach()
        kept = zeros_by_hand(weight.abs() * inputs.norm(dim=0), pattern)
        torch.testing.assert_close(getattr(found, name).weight, weight * kept)
        if pattern == "2:4":
            assert set((getattr(found, name).weight.unflatten(1, (-1, 4)) != 0).sum(-1).flatten().tolist()) == {2}
    assert routed(model, models.inputs(2, 9))[1] == pytest.approx(0.5)
    model.save_pretrained(tmp_path)
    assert routed(lte.load(tmp_path), models.inputs(2, 9))[1] == pytest.approx(0.5)


def test_wanda_refuses_what_it_cannot_do():
    with pytest.raises(ConfigError, match="pattern=2:4 leaves out half, not sparsity=0.75; give 0.5"):
        made("wanda", pattern="2:4")


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "gpt_neox"])
def test_relufication_leaves_out_what_the_relu_cuts_off(family, tmp_path):
    model = made("relufication", family)
    ffn, x = sparse_ffns(model)[0], first_inputs(model)
    with torch.no_grad():
        assert torch.equal(ffn.router(x).mask, ffn.hidden(x) != 0)
        sparse = ffn(x)
        lte.set_mode(model, "dense")
        torch.testing.assert_close(sparse, ffn(x))
    model.save_pretrained(tmp_path)
    stock = json.loads((tmp_path / "config.json").read_text())
    assert "relu" in (stock.get("hidden_act"), stock.get("activation_function"))


def test_any_method_may_replace_the_activation():
    model = made("sparseinfer", "llama", activation="relu")
    assert model.config.hidden_act == "relu"
    plain = models.build("llama")
    with pytest.raises(ConfigError, match="needs calibration data"):
        lte.sparsify(plain, lte.DejaVuConfig(activation="relu"))
    broken = [{**models.inputs(2, 8), "labels": torch.zeros(3, 8).long()}]
    with pytest.raises(ValueError, match="batch_size"):
        lte.sparsify(plain, lte.SelfPredictionConfig(activation="relu", group=32), calibration=broken)
    assert plain.config.hidden_act == "silu"
    assert type(plain.model.layers[0].mlp.act_fn).__name__ == "SiLUActivation"


def test_a_share_is_bounded():
    with pytest.raises(ConfigError, match=r"sparsity=1.0: Input should be less than 1"):
        lte.KLAConfig(sparsity=1.0)
