"""A prepared model says what the masked dense model says, faster, and stays an ordinary model."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import lte
from lte import memory
from lte.errors import BackendError, CheckpointError, LTEError
from lte.families import DECODERS
from lte.inference import Crossover, decode, restore
from lte.inference.decode import DecodeStep
from lte.nn import FastLinear, SparsityMeter, observe_routing, set_mode, sparse_ffns
from lte.ops import cpu
from lte.thresholds import shifted
from tests import models

DECODING = [name for name in models.CONFIGS if name not in models.ENCODERS]
FUSED = [name for name in DECODING if models.CONFIGS[name].model_type in DECODERS]
STORIES = Path(__file__).parents[3] / "shared" / "data" / "models" / "stories-3m"

pytestmark = pytest.mark.skipif(bool(cpu.unavailable()), reason=cpu.unavailable() or "kernels built")


def sparse(name: str, dtype: torch.dtype = torch.float32, method: str = "lte"):
    if method == "self-prediction":
        batch = models.inputs(8, 16)
        labelled = {**batch, "labels": batch["input_ids"]}
        model = lte.sparsify(models.build(name), lte.SelfPredictionConfig(group=32), calibration=[labelled]).eval()
        lte.calibrate(model, [batch], 0.6)
        return model.to(dtype)
    model = lte.sparsify(models.build(name), lte.LTEConfig(expert_size=8, grouping="random", router_init="random"))
    models.spread_routers(model)
    return model.to(dtype)


def pair(name: str, dtype: torch.dtype = torch.float32, method: str = "lte", **kwargs):
    """The masked dense model and the same one prepared, its kernels forced."""
    plain = sparse(name, dtype, method)
    for ffn in sparse_ffns(plain):
        ffn.choose_path = lambda tokens: ("reference", 1.0)
    return plain, lte.prepare_for_inference(sparse(name, dtype, method), **{"impl": "cpu", **kwargs})


def padded(batch: int, length: int = 9) -> dict[str, torch.Tensor]:
    """Prompts with padding on the left, each row with more of it."""
    given = models.inputs(batch, length)
    for row in range(1, batch):
        given["input_ids"][row, :row] = 0
        given["attention_mask"][row, :row] = 0
    return given


def generate(model, inputs, **options):
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(**inputs, **options)


@pytest.fixture
def fused_steps(monkeypatch):
    """Counts the decode steps that the fused kernel took."""
    count = []
    real = DecodeStep._step

    def counted(self, **kwargs):
        logits = real(self, **kwargs)
        if logits is not None:
            count.append(1)
        return logits

    monkeypatch.setattr(DecodeStep, "_step", counted)
    return count


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", DECODING)
@pytest.mark.parametrize("method", ["lte", "self-prediction"])
def test_greedy_generation_is_the_same_token_for_token(method, name, batch, fused_steps):
    plain, fast = pair(name, method=method)
    inputs = padded(batch)
    assert torch.equal(generate(plain, inputs), generate(fast, inputs))
    assert len(fused_steps) == (23 if name in FUSED else 0)


@pytest.mark.parametrize("everything", [False, True], ids=["some", "all"])
@pytest.mark.parametrize("method", ["lte", "self-prediction"])
def test_a_batch_of_twenty_token_for_token(method, everything, fused_steps):
    plain, fast = pair("llama", method=method)
    for ffn in (*sparse_ffns(plain), *sparse_ffns(fast)) if everything else ():
        ffn.router.threshold = shifted(0.5, -math.inf)
    inputs = padded(20, 25)
    assert torch.equal(generate(plain, inputs), generate(fast, inputs))
    assert len(fused_steps) == 23


def test_a_batch_of_twenty_in_bf16(fused_steps):
    """A token's router may fall on either side of its threshold: nine in ten agree to 3 % of the largest logit."""
    plain, fast = pair("llama", torch.bfloat16)
    options = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 2, "min_new_tokens": 2}
    ours, theirs = (generate(m, padded(20, 25), **options) for m in (fast, plain))
    same = ours.sequences[:, -2] == theirs.sequences[:, -2]
    a, b = (found.logits[1].float()[same] for found in (ours, theirs))
    assert same.sum() > 15
    assert ((a - b).abs().amax(1) < 0.03 * b.abs().max()).float().mean() > 0.9
    assert len(fused_steps) == 1


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "phi3"])
def test_logits_in_bf16(name, fused_steps):
    """Both round to bf16, at different places: within 3 % of the largest logit at every step."""
    plain, fast = pair(name, torch.bfloat16)
    assert {p.dtype for ffn in sparse_ffns(fast) for p in ffn.router.parameters()} == {torch.float32}
    options = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 4, "min_new_tokens": 4}
    ours, theirs = (generate(m, padded(2), **options).logits for m in (fast, plain))
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        assert (a.float() - b.float()).abs().max() < 0.03 * b.float().abs().max()
    assert len(fused_steps) == (3 if name in FUSED else 0)


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"do_sample": True, "top_k": 5}, {"num_return_sequences": 2, "num_beams": 2}]
)
def test_other_ways_to_generate(options, fused_steps):
    plain, fast = pair("llama")
    torch.manual_seed(0)
    wanted = generate(plain, padded(2), **options)
    torch.manual_seed(0)
    assert torch.equal(generate(fast, padded(2), **options), wanted)
    assert fused_steps


def test_a_cache_goes_on_being_an_ordinary_cache(fused_steps):
    plain, fast = pair("llama")
    inputs = models.inputs(1, 6)

    def talk(model):
        first = generate(model, inputs, return_dict_in_generate=True)
        cache, text = first.past_key_values, first.sequences
        cache.crop(-5)
        longer = {"input_ids": torch.cat([text, text[:, :4]], 1)}
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
        return generate(model, longer, past_key_values=cache)

    with torch.no_grad():
        assert torch.equal(talk(plain), talk(fast))
    assert fused_steps


def test_a_long_generation_outgrows_the_buffers(fused_steps):
    config = copy.deepcopy(models.CONFIGS["llama"])
    config.max_position_embeddings = 1024
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    lte.sparsify(model, lte.LTEConfig(expert_size=8, grouping="random", router_init="random"))
    models.spread_routers(model)
    plain = copy.deepcopy(model)
    lte.prepare_for_inference(model, impl="cpu")
    inputs = models.inputs(1, 5)
    assert torch.equal(
        generate(model, inputs, max_new_tokens=600, min_new_tokens=600),
        generate(plain, inputs, max_new_tokens=600, min_new_tokens=600),
    )
    assert len(fused_steps) == 599


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_saving_and_training_go_on_as_before(name, tmp_path):
    plain, fast = pair(name)
    fast.save_pretrained(tmp_path / "fast")
    inputs = models.inputs()
    with torch.no_grad():
        torch.testing.assert_close(lte.load(tmp_path / "fast")(**inputs).logits, plain(**inputs).logits)
    for model in (plain, fast):
        model.train()
        torch.manual_seed(0)  # of dropout
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    wanted = dict(plain.named_parameters())
    for key, parameter in fast.named_parameters():
        if wanted[key].grad is not None:
            torch.testing.assert_close(parameter.grad, wanted[key].grad, rtol=1e-4, atol=1e-6)


def test_weights_that_change_are_read_again():
    plain, fast = pair("llama")
    generate(fast, models.inputs(1))
    with torch.no_grad():
        for model in (plain, fast):
            model.model.layers[0].self_attn.q_proj.weight.mul_(-1.5)
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * -0.5)
    assert torch.equal(generate(plain, models.inputs(1)), generate(fast, models.inputs(1)))


def test_a_copy_is_a_model_of_its_own():
    _, fast = pair("llama")
    before = generate(fast, models.inputs(1))
    twin = copy.deepcopy(fast)
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.zero_()
    assert torch.equal(generate(twin, models.inputs(1)), before)


def test_hooks_and_observers_still_see_everything(fused_steps):
    _, fast = pair("llama")
    seen = []
    handle = fast.model.layers[1].self_attn.o_proj.register_forward_hook(lambda *args: seen.append(1))
    generate(fast, models.inputs(1))
    assert len(seen) == 24
    assert not fused_steps
    handle.remove()
    meter = SparsityMeter(models.LAYERS)
    meter.set_token_mask(torch.ones(1, 1, dtype=torch.bool))
    with observe_routing(fast, lambda layer, routing: meter(layer, routing) if routing.mask.shape[1] == 1 else None):
        generate(fast, models.inputs(1))
    assert 0.2 < meter.overall < 0.8
    assert not fused_steps


@pytest.mark.parametrize("bits", [None, 8])
def test_a_router_whose_threshold_is_the_lowest_is_not_asked(bits, fused_steps):
    settings = lte.LTEConfig(expert_size=32, grouping="none", router_init="random")
    model, inputs = lte.sparsify(models.build("llama"), settings), padded(2)
    if bits:
        lte.quantize(model, bits=bits)
    routers = [ffn.router for ffn in sparse_ffns(model)]
    with torch.no_grad():
        for router in routers:
            router.weight.zero_()
            router.bias.fill_(5.0)
        expected = generate(model, inputs)
        for router in routers:
            router.threshold = shifted(router.threshold, -math.inf)
            router.weight.fill_(math.nan)
    assert torch.equal(generate(model, inputs), expected)
    fast = lte.prepare_for_inference(model, impl="cpu")
    assert torch.equal(generate(fast, inputs), expected)
    assert fused_steps


def test_dense_mode_runs_dense(fused_steps):
    plain, fast = pair("llama")
    for model in (plain, fast):
        set_mode(model, "dense")
    assert torch.equal(generate(plain, models.inputs(1)), generate(fast, models.inputs(1)))
    assert fused_steps


def test_preparing_twice_and_restoring():
    plain, fast = pair("llama")
    lte.prepare_for_inference(fast)
    assert isinstance(fast.forward, DecodeStep)
    restore(fast)
    assert not isinstance(fast.forward, DecodeStep)
    assert not any(isinstance(module, FastLinear) for module in fast.modules())
    assert torch.equal(generate(plain, models.inputs(1)), generate(fast, models.inputs(1)))


def test_a_model_nobody_prepared_runs_the_operator_too(monkeypatch):
    model = sparse("gpt2")
    wanted = generate(pair("gpt2")[0], models.inputs(1))
    called = []
    real = cpu.sparse_ffn
    monkeypatch.setattr("lte.ops.operator.cpu.sparse_ffn", lambda *args: called.append(1) or real(*args))
    assert torch.equal(generate(model, models.inputs(1)), wanted)
    assert len(called) == 24 * models.LAYERS


def test_what_was_measured_is_logged_saved_and_used_again(tmp_path, caplog):
    model = sparse("llama")
    with caplog.at_level(logging.INFO, logger="lte"):
        lte.prepare_for_inference(model)
        assert "measured in" in caplog.text
        model.lte_crossover.save(tmp_path)
        caplog.clear()
        lte.prepare_for_inference(sparse("llama"), crossover=tmp_path)
        assert "measured before" in caplog.text
        assert "measured in" not in caplog.text
        caplog.clear()
        lte.prepare_for_inference(sparse("gpt2").to(torch.bfloat16), crossover=tmp_path)
        assert "measuring again" in caplog.text
    (tmp_path / "lte_crossover.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no table of measured speeds"):
        lte.prepare_for_inference(model, crossover=tmp_path)


def test_the_table_decides():
    table = Crossover("here", "shape", "cpu", {1: 1.0, 4: 0.4, 16: 0.0})
    assert table.choose(1) == ("fastest", 1.0)
    assert table.choose(3) == ("fastest", 0.4)
    assert table.choose(5) == table.choose(500) == ("reference", 0.0)
    gpu = Crossover("here", "shape", "triton", {1: 1.0, 4: 0.4}, expected_density=0.5)
    assert gpu.choose(1) == ("fastest", 1.0)
    assert gpu.choose(4)[0] == "reference"
    assert "4: sparse above 60 % sparsity" in table.describe()


def test_the_reference_can_be_asked_for(monkeypatch, fused_steps):
    plain, _ = pair("llama")
    for prepare in (lambda m: lte.prepare_for_inference(m, impl="reference"), lte.prepare_for_inference):
        model = prepare(sparse("llama"))
        assert torch.equal(generate(model, models.inputs(1)), generate(plain, models.inputs(1)))
        assert not fused_steps
        monkeypatch.setenv("LTE_BACKEND", "reference")


def test_without_the_kernels_the_reference_runs_and_says_so(monkeypatch, caplog):
    from lte.ops import backends
    from lte.ops.cpu import library

    plain, _ = pair("llama")
    backends.obstacle.cache_clear()
    monkeypatch.setattr(library, "_open", lambda: (None, "the C++ kernels were not built"))
    try:
        with caplog.at_level(logging.WARNING, logger="lte"):
            model = lte.prepare_for_inference(sparse("llama"))
        assert "the C++ kernels were not built" in caplog.text
        assert torch.equal(generate(model, models.inputs(1)), generate(plain, models.inputs(1)))
        with pytest.raises(BackendError, match="not built"):
            lte.prepare_for_inference(sparse("llama"), impl="cpu")
    finally:
        backends.obstacle.cache_clear()


def test_a_dense_model_is_refused():
    with pytest.raises(CheckpointError, match="dense"):
        lte.prepare_for_inference(models.build("llama"))
    with pytest.raises(LTEError, match="tensors are on cpu"):
        lte.prepare_for_inference(sparse("llama"), impl="triton")


@pytest.mark.slow
@pytest.mark.skipif(not STORIES.is_dir(), reason="the development model is not here")
@pytest.mark.parametrize("batch", [1, 4])
def test_a_real_model_for_200_tokens(batch, fused_steps):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(STORIES, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    config = lte.LTEConfig(grouping="kmeans", router_init="random", router_init_score=0.5, router_init_std=2.0)
    lte.sparsify(model, config)
    plain = copy.deepcopy(model)
    for ffn in sparse_ffns(plain):
        ffn.choose_path = lambda tokens: ("reference", 1.0)
    lte.prepare_for_inference(model)
    prompts = ["Once upon a time", "The little dog was very happy because", "Lily", "One day, a big bird"][:batch]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    options = {"max_new_tokens": 200, "min_new_tokens": 200, "pad_token_id": tokenizer.pad_token_id}
    assert torch.equal(generate(plain, inputs, **options), generate(model, inputs, **options))
    assert len(fused_steps) == 199


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lte", "self-prediction"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_compiled_decode_step_has_no_graph_break(name, method):
    plain, fast = pair(name, method=method)
    ids = models.inputs(2, 8)["input_ids"]

    def step(model, compiled):
        cache = StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            model(ids, past_key_values=cache, use_cache=True)
            call = torch.compile(model, fullgraph=True) if compiled else model
            return call(ids[:, :1], past_key_values=cache, use_cache=True).logits

    torch.testing.assert_close(step(fast, True), step(plain, False), rtol=1e-4, atol=1e-5)


class Doubled(torch.nn.Module):
    """As an adapter wraps a layer."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


def replace_up(model):
    for layer in model.model.layers:
        layer.mlp.up_proj = Doubled(layer.mlp.up_proj)


def replace_head(model):
    model.lm_head = Doubled(model.lm_head)


def patch_forward(model):
    projection = model.model.layers[0].self_attn.o_proj
    old = projection.forward
    projection.forward = lambda x: 2 * old(x)


def patch_down(model):
    projection = model.model.layers[0].mlp.down_proj
    old = projection.forward
    projection.forward = lambda x: 2 * old(x)


def raise_thresholds(model):
    for ffn in sparse_ffns(model):
        ffn.router.threshold = 0.7


def change_weights(model):
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight.copy_(layer.mlp.gate_proj.weight.flip(0))


CHANGES = [replace_up, replace_head, patch_forward, patch_down, raise_thresholds, change_weights]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("method", "change"),
    # A copy is made of weights: not of a module that has none.
    [("lte", change) for change in CHANGES] + [("self-prediction", c) for c in CHANGES if c is not replace_up],
)
def test_whatever_changes_in_the_model_is_noticed(method, change, when):
    plain, fast = pair("llama", method=method)
    if when == "after":
        generate(fast, models.inputs(2))
    for model in (plain, fast):
        change(model)
    assert torch.equal(generate(plain, models.inputs(2)), generate(fast, models.inputs(2)))


@torch.no_grad()
def step_by_step(model, cache, ids, **options):
    """Logits of the last tokens, fed one by one after a prompt of six."""
    model(input_ids=ids[:, :6], past_key_values=cache, use_cache=True)
    steps = range(6, ids.shape[1])
    return torch.cat([model(ids[:, i : i + 1], past_key_values=cache, **options).logits for i in steps], 1)


@pytest.mark.parametrize("config", [True, False])
def test_a_sliding_window_slides(config, fused_steps):
    changed = copy.deepcopy(models.CONFIGS["mistral"])
    changed.sliding_window = 9
    torch.manual_seed(0)
    plain = lte.sparsify(
        AutoModelForCausalLM.from_config(changed).eval(),
        lte.LTEConfig(expert_size=8, grouping="random", router_init="random"),
    )
    fast = lte.prepare_for_inference(copy.deepcopy(plain), impl="cpu")
    ids = models.inputs(2, 20)["input_ids"]
    wanted, got = (
        step_by_step(m, DynamicCache(config=m.config) if config else DynamicCache(), ids) for m in (plain, fast)
    )
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert len(fused_steps) == 2


@pytest.mark.parametrize("rope", ["dynamic", "llama3", "yarn"])
def test_rotary_embeddings_of_every_kind(rope):
    changed = copy.deepcopy(models.CONFIGS["llama"])
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 12}
    kinds = {"dynamic": {}, "llama3": more, "yarn": {"original_max_position_embeddings": 12}}
    changed.max_position_embeddings = 12
    changed.rope_parameters = {"rope_type": rope, "factor": 2.0, "rope_theta": 10000.0, **kinds[rope]}
    torch.manual_seed(0)
    plain = lte.sparsify(
        AutoModelForCausalLM.from_config(changed).eval(),
        lte.LTEConfig(expert_size=8, grouping="random", router_init="random"),
    )
    fast = lte.prepare_for_inference(copy.deepcopy(plain), impl="cpu")
    ids = models.inputs(1, 24)["input_ids"]
    wanted, got = (step_by_step(m, DynamicCache(config=m.config), ids) for m in (plain, fast))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_caches_that_part_ways_do_not_write_over_each_other():
    plain, fast = pair("llama")
    ids = models.inputs(1, 12)["input_ids"]

    @torch.no_grad()
    def branches(model):
        cache = DynamicCache(config=model.config)
        step_by_step(model, cache, ids[:, :8])
        fork = copy.copy(cache)
        fork.layers = [copy.copy(layer) for layer in cache.layers]
        held = [(layer.keys, layer.values) for layer in cache.layers]
        out = []
        for branch, token in ((cache, 8), (fork, 9), (cache, 10), (fork, 11)):
            out.append(model(ids[:, token : token + 1], past_key_values=branch).logits)
        for layer, (keys, values) in zip(cache.layers, held, strict=True):
            layer.keys, layer.values = keys, values
        out.append(model(ids[:, 9:10], past_key_values=cache).logits)
        out.append(model(ids[:, 10:11], past_key_values=fork).logits)
        return torch.cat(out)

    torch.testing.assert_close(branches(fast), branches(plain), rtol=1e-4, atol=1e-5)


def test_unusual_positions_and_masks():
    plain, fast = pair("llama")
    ids = models.inputs(3, 7)["input_ids"]
    positions = torch.tensor([[-1], [3], [6]])
    wanted, got = (step_by_step(m, DynamicCache(config=m.config), ids, position_ids=positions) for m in (plain, fast))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0], mask[1, 2] = 0, 0
    wanted, got = (step_by_step(m, DynamicCache(config=m.config), ids, attention_mask=mask) for m in (plain, fast))
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got[1:], wanted[1:], rtol=1e-4, atol=1e-5)


def test_what_the_config_asks_for_is_given():
    _, fast = pair("llama")
    fast.config.output_hidden_states = True
    cache, ids = DynamicCache(config=fast.config), models.inputs(1, 7)["input_ids"]
    step_by_step(fast, cache, ids)
    with torch.no_grad():
        assert len(fast(input_ids=ids[:, :1], past_key_values=cache).hidden_states) == models.LAYERS + 1


def test_a_token_that_does_not_exist_leaves_the_cache_as_it_was():
    _, fast = pair("llama")
    cache = DynamicCache(config=fast.config)
    step_by_step(fast, cache, models.inputs(1, 8)["input_ids"])
    with torch.no_grad(), pytest.raises(IndexError):
        fast(input_ids=torch.tensor([[10**6]]), past_key_values=cache)
    assert cache.get_seq_length() == 8


def test_casting_and_pickling_a_prepared_model(tmp_path):
    _, fast = pair("llama")
    torch.save(fast, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(generate(again, models.inputs(1)), generate(fast, models.inputs(1)))
    measured = lte.prepare_for_inference(sparse("llama"))
    assert generate(measured.double(), models.inputs(1)).shape == (1, 35)
    assert generate(measured.to(torch.bfloat16), models.inputs(1)).shape == (1, 35)


def test_the_environment_forces_a_prepared_model_too(monkeypatch):
    monkeypatch.setenv("LTE_BACKEND", "cpu")
    assert not hasattr(lte.prepare_for_inference(sparse("llama")), "lte_crossover")
    model = sparse("gpt2")
    monkeypatch.setenv("LTE_BACKEND", "triton")
    with pytest.raises(BackendError, match="tensors are on cpu"), torch.no_grad():
        model(**models.inputs(4, 40))


def test_bad_settings():
    with pytest.raises(LTEError, match=r"expected_sparsity=7.0 is out of range"):
        lte.prepare_for_inference(sparse("llama"), expected_sparsity=7.0)


def test_codes_of_a_loaded_model_are_moved_to_where_they_are_read_fast(tmp_path):
    config = copy.deepcopy(models.CONFIGS["llama"])
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 512, 8192, 1
    config.num_attention_heads = config.num_key_value_heads = 8
    config.head_dim = 64
    stock = AutoModelForCausalLM.from_config(config).eval()
    lte.quantize(stock, bits=8).save_pretrained(tmp_path)
    model = lte.load(tmp_path)
    large = {name for name, buffer in model.named_buffers() if buffer.nbytes >= memory.HUGE_PAGE}
    assert large
    wanted = generate(model, models.inputs(1, 5))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    lte.prepare_for_inference(model)
    moved = dict(model.named_buffers())
    assert all(torch.equal(buffer, moved[name]) for name, buffer in before.items())
    assert all(memory.is_for_streaming(moved[name]) for name in large)
    assert torch.equal(generate(model, models.inputs(1, 5)), wanted)
    places = {name: buffer.data_ptr() for name, buffer in moved.items()}
    lte.prepare_for_inference(model)  # they stay there
    assert places == {name: buffer.data_ptr() for name, buffer in model.named_buffers()}


def test_a_cache_that_was_touched_between_two_steps_is_read_as_it_is():
    plain, fast = pair("llama")
    ids = models.inputs(1, 12)["input_ids"]
    found = {}
    for name, model in (("plain", plain), ("fast", fast)):
        cache, logits = DynamicCache(config=model.config), []
        with torch.no_grad():
            model(ids[:, :6], past_key_values=cache, use_cache=True)
            for step in range(5):
                logits.append(model(ids[:, 6 + step : 7 + step], past_key_values=cache, use_cache=True).logits)
                if step == 1:
                    cache.crop(-1)
                if step == 2:  # values of its own
                    for layer in cache.layers:
                        layer.keys, layer.values = layer.keys.flip(2), layer.values.clone()
                if step == 3:
                    other = copy.deepcopy(cache)
                    again = model(ids[:, 10:11], past_key_values=other, use_cache=True).logits
            torch.testing.assert_close(again, logits[4])
        found[name] = torch.cat(logits)
    torch.testing.assert_close(found["fast"], found["plain"], atol=1e-4, rtol=1e-4)


def test_structs_of_a_cache_serve_from_step_to_step(monkeypatch):
    _, fast = pair("llama")
    calls = []
    before = decode.room
    monkeypatch.setattr(decode, "room", lambda layer, position: calls.append(position) or before(layer, position))
    generate(fast, models.inputs(1, 5))
    assert set(calls) == {5}
