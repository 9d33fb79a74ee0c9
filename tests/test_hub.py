"""Saved models: sparse when loaded here, dense and equal in stock transformers, and never silently dense."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import lte
from lte.errors import CheckpointError, ConfigError, LTEError
from lte.hub import SparseModelLoader
from lte.nn import set_mode, sparse_ffns
from tests import models


@pytest.fixture
def saved(tmp_path):
    model = lte.sparsify(
        models.build("llama"),
        lte.LTEConfig(expert_size=8, grouping="random", router_init="random", threshold=0.3, router_init_score=0.4),
    )
    models.spread_routers(model)
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(**models.inputs()).logits


def edit_config(path, change) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def edit_weights(path, change) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def router_key(tensors) -> str:
    return next(key for key in tensors if key.endswith("router.weight"))


STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
auto = AutoModelForSequenceClassification if sys.argv[3] == "encoder" else AutoModelForCausalLM
model = auto.from_pretrained(sys.argv[1])
assert "lte" not in sys.modules
inputs = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save(model(**inputs).logits, sys.argv[2])
"""


@pytest.mark.parametrize("name", ["llama", "phi3", "opt", "gpt2", "gpt_neox", "bert"])
def test_stock_transformers_loads_an_equal_dense_model(name, tmp_path):
    """In a process that never imports lte; every other family shares its layout with one of these."""
    expected = logits(models.build(name))
    model = lte.sparsify(models.build(name), lte.LTEConfig(expert_size=8, grouping="random", router_init="random"))
    model.save_pretrained(tmp_path / "model")
    tensors = tmp_path / "tensors.pt"
    torch.save(models.inputs(), tensors)
    kind = "encoder" if name in models.ENCODERS else "decoder"
    script = subprocess.run(
        [sys.executable, "-c", STOCK, str(tmp_path / "model"), str(tensors), kind],
        capture_output=True,
        text=True,
    )
    assert script.returncode == 0, script.stderr
    torch.testing.assert_close(torch.load(tensors, weights_only=True), expected, atol=1e-5, rtol=1e-5)


def test_threshold_and_routers_survive(saved):
    model, path = saved
    loaded = lte.load(path)
    for before, after in zip(sparse_ffns(model), sparse_ffns(loaded), strict=True):
        assert after.router.threshold == 0.3
        assert torch.equal(before.router.weight, after.router.weight)
        assert torch.equal(before.router.bias, after.router.bias)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_round_trips(saved, dtype, tmp_path):
    model, _ = saved
    model.to(dtype)
    model.save_pretrained(tmp_path / "a")
    once = lte.load(tmp_path / "a")
    once.save_pretrained(tmp_path / "b")
    twice = lte.load(tmp_path / "b", dtype=dtype)
    assert twice.dtype == dtype
    assert sparse_ffns(twice)[0].router.threshold == 0.3
    # Against the model before saving only the weights are compared: `.to` rounds its rotary buffer, loading does not.
    for loaded in (once, twice):
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(twice), logits(once))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_routers_stay_float32_to_the_bit_beside_other_weights(name, dtype, tmp_path):
    config = lte.LTEConfig(expert_size=8, grouping="random", router_init="random")
    model = lte.sparsify(models.build(name), config).to(dtype)
    models.spread_routers(model)
    wanted = {key: value.clone() for key, value in model.state_dict().items() if ".router." in key}
    model.save_pretrained(tmp_path)
    kept = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for key, value in kept.items() if ".router." in key} == {torch.float32, torch.int64}
    assert {value.dtype for key, value in kept.items() if ".router." not in key} == {dtype}
    auto = AutoModelForSequenceClassification if name in models.ENCODERS else AutoModelForCausalLM
    other = {torch.bfloat16: torch.float16, torch.float16: torch.bfloat16}[dtype]
    for load, asked, found in (
        (lte.load, {}, dtype),
        (lte.load, {"dtype": dtype}, dtype),
        (lte.load, {"dtype": other}, other),
        (lte.load, {"dtype": torch.float32}, torch.float32),
        (auto.from_pretrained, {"dtype": "auto"}, dtype),
        (auto.from_pretrained, {"dtype": torch.bfloat16}, torch.bfloat16),
    ):
        loaded = load(tmp_path, **asked)
        assert loaded.dtype == found
        state = loaded.state_dict()
        assert {value.dtype for key, value in state.items() if ".router." not in key} == {found}
        for key, value in wanted.items():
            assert state[key].dtype == value.dtype
            assert torch.equal(state[key], value)


def test_routers_of_an_older_low_precision_checkpoint_load_as_float32(saved, tmp_path):
    saved[0].to(torch.bfloat16).save_pretrained(tmp_path / "old")
    rounded = {}

    def round_all(tensors) -> None:
        routers = {key: value for key, value in tensors.items() if ".router." in key and value.is_floating_point()}
        rounded.update({key: value.bfloat16() for key, value in routers.items()})
        tensors.update(rounded)

    edit_weights(tmp_path / "old", round_all)
    state = lte.load(tmp_path / "old").state_dict()
    assert all(state[key].dtype == torch.float32 and torch.equal(state[key], rounded[key].float()) for key in rounded)
    assert {value.dtype for key, value in state.items() if ".router." not in key} == {torch.bfloat16}


def test_loading_in_bf16_keeps_nearly_every_decision(saved):
    model, path = saved
    low = lte.load(path, dtype=torch.bfloat16)
    x = torch.randn(200, models.D_MODEL)
    full, rounded = sparse_ffns(model)[0].router(x).mask, sparse_ffns(low)[0].router(x).mask
    assert (full == rounded).float().mean() > 0.99


def test_sharded_checkpoints(saved, tmp_path):
    model, _ = saved
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert torch.equal(logits(lte.load(tmp_path / "shards")), logits(model))


def test_a_missing_shard_is_an_error(saved, tmp_path):
    model, _ = saved
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    sorted((tmp_path / "shards").glob("*.safetensors"))[1].unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        lte.load(tmp_path / "shards")


def test_a_loaded_model_is_an_ordinary_one(saved):
    """Not restricted as quantized models are: it can be cast, trained and saved again."""
    loaded = lte.load(saved[1])
    assert not getattr(loaded, "is_quantized", False)
    assert not hasattr(loaded, "hf_quantizer")
    loaded.half().float()
    loaded(**models.inputs(), labels=models.inputs()["input_ids"]).loss.backward()


def test_base_model_of_a_sparse_checkpoint(saved):
    model, path = saved
    base = AutoModel.from_pretrained(path)
    with torch.no_grad():
        assert torch.equal(base(**models.inputs()).last_hidden_state, model.model(**models.inputs()).last_hidden_state)


def test_dense_checkpoint_is_refused(tmp_path):
    models.build("llama").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is a dense checkpoint"):
        lte.load(tmp_path)


def test_removed_entry_is_refused(saved):
    edit_config(saved[1], lambda config: config.pop("quantization_config"))
    with pytest.raises(CheckpointError, match="is a dense checkpoint: its config.json has no quantization_config"):
        lte.load(saved[1])


LOADERS = [lte.load, AutoModelForCausalLM.from_pretrained]


@pytest.mark.parametrize("load", LOADERS, ids=["lte.load", "from_pretrained"])
class TestBrokenCheckpoints:
    def test_missing_router(self, saved, load):
        edit_weights(saved[1], lambda tensors: tensors.pop(router_key(tensors)))
        with pytest.raises(CheckpointError, match=r"lacks routers: layers.0.mlp.router.weight; it was edited"):
            load(saved[1])

    def test_missing_ffn_weight(self, saved, load):
        edit_weights(saved[1], lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
        with pytest.raises(CheckpointError, match=r"lacks FFN weights: layers.1.mlp.up_proj.weight"):
            load(saved[1])

    def test_router_of_another_shape(self, saved, load):
        def cut(tensors):
            key = router_key(tensors)
            tensors[key] = tensors[key][:4].clone()

        edit_weights(saved[1], cut)
        with pytest.raises(CheckpointError, match=r"router.weight has shape \[4, 32\], but config.json"):
            load(saved[1])

    def test_fewer_layers_in_the_config(self, saved, load):
        edit_config(saved[1], lambda config: config.update(num_hidden_layers=1))
        with pytest.raises(
            CheckpointError, match="holds routers that config.json has no layers for: layers.1.mlp.router._extra_state"
        ):
            load(saved[1])

    def test_router_with_nan(self, saved, load):
        edit_weights(saved[1], lambda tensors: tensors[router_key(tensors)].fill_(float("nan")))
        with pytest.raises(CheckpointError, match="not finite"):
            load(saved[1])

    @pytest.mark.parametrize("name", ["layers.1.mlp.down_proj", "embed_tokens", "norm", "layers.0.self_attn.q_proj"])
    @pytest.mark.parametrize("value", [float("nan"), float("-inf")])
    def test_other_weights_with_nan(self, saved, load, name, value):
        edit_weights(saved[1], lambda tensors: tensors[f"model.{name}.weight"].view(-1)[3:5].fill_(value))
        with pytest.raises(CheckpointError, match=rf"model.{name}.weight has 2 of \d+ numbers that are NaN or"):
            load(saved[1])

    def test_tensor_parallelism(self, saved, load, monkeypatch):
        def before(loader, model, checkpoint_files=None, **kwargs):
            model.config.distributed_config = SimpleNamespace(tp_plan=None, tp_size=2)
            original(loader, model, checkpoint_files=checkpoint_files, **kwargs)

        original = SparseModelLoader._process_model_before_weight_loading
        monkeypatch.setattr(SparseModelLoader, "_process_model_before_weight_loading", before)
        with pytest.raises(CheckpointError, match="cannot be loaded with tensor parallelism"):
            load(saved[1])

    def test_other_expert_size_in_the_config(self, saved, load):
        edit_config(saved[1], lambda config: config["quantization_config"].update(expert_size=16))
        with pytest.raises(CheckpointError, match="one of the two was edited"):
            load(saved[1])

    def test_later_version(self, saved, load):
        edit_config(saved[1], lambda config: config["quantization_config"].update(format_version=3))
        with pytest.raises(CheckpointError, match=r"format_version=3, but this version of lte reads 2"):
            load(saved[1])

    def test_unknown_setting(self, saved, load):
        edit_config(saved[1], lambda config: config["quantization_config"].update(treshold=0.4))
        with pytest.raises(CheckpointError, match="unknown key 'treshold'; did you mean 'threshold'"):
            load(saved[1])

    def test_unknown_method(self, saved, load):
        edit_config(saved[1], lambda config: config["quantization_config"].update(method="magic"))
        with pytest.raises(CheckpointError, match="unknown method 'magic'; known methods: bank-topk, cats"):
            load(saved[1])

    @pytest.mark.parametrize("keep", [0.5, 0.001], ids=["half", "header"])
    def test_truncated_file(self, saved, load, keep):
        file = saved[1] / "model.safetensors"
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])
        with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
            load(saved[1])


def test_a_dense_model_with_nan(tmp_path):
    models.build("llama").save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors["lm_head.weight"].view(-1)[:1].fill_(float("inf")))
    with pytest.raises(CheckpointError, match="lm_head.weight has 1 of"):
        lte.load_dense(tmp_path)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError("[enforce fail] not enough memory: 7")])
def test_too_little_memory_is_no_broken_checkpoint(saved, error, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", fail)
    with pytest.raises(LTEError, match="not enough memory to load it; try dtype=bfloat16"):
        lte.load(saved[1])


def test_missing_other_weight(saved):
    edit_weights(saved[1], lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"the checkpoint lacks model.norm.weight"):
        lte.load(saved[1])


@pytest.mark.parametrize("path", ["./nowhere", "/no/such/folder", "a/b/c", "tests/nowhere"])
def test_missing_folder(path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(CheckpointError, match="no model folder"):
        lte.load(path)


def test_folder_without_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no config.json"):
        lte.load(tmp_path)


def test_unknown_architecture(saved):
    edit_config(saved[1], lambda config: config.update(architectures=["FooModel"]))
    with pytest.raises(CheckpointError, match=r"architectures=\['FooModel'\], which transformers lacks"):
        lte.load(saved[1])


def test_require_sparse(saved):
    model, _ = saved
    lte.require_sparse(model)
    set_mode(model, "soft")
    with pytest.raises(CheckpointError, match="runs in soft mode"):
        lte.require_sparse(model)
    with pytest.raises(CheckpointError, match="LlamaForCausalLM is dense"):
        lte.require_sparse(models.build("llama"))


def test_push_to_hub_reaches_the_hub(saved, monkeypatch):
    """Nothing of ours stands in the way: the stock code gets as far as asking the hub for a repository."""
    asked = []

    def create_repo(self, repo_id, **kwargs):
        asked.append(repo_id)
        raise ConnectionError("no network in tests")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create_repo)
    with pytest.raises(ConnectionError, match="no network in tests"):
        saved[0].push_to_hub("someone/sparse")
    assert asked == ["someone/sparse"]


def test_a_dense_model_in_parts_is_not_made_sparse():
    model = models.build("llama")
    model._tp_size = 2
    with pytest.raises(ConfigError, match=r"the model lies in 2 parts \(tensor parallelism\)"):
        lte.sparsify(model, lte.LTEConfig(expert_size=8))
