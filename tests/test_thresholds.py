from __future__ import annotations

import copy
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lte
from lte.errors import CalibrationError, CheckpointError, ConfigError
from lte.hub import save_thresholds
from lte.nn import SparsityMeter, observe_routing, read_thresholds, sparse_ffns
from lte.thresholds import set_thresholds, thresholds_of
from tests import models
from tests.training.common import sparse_model


def batches(n: int = 4) -> list[dict[str, torch.Tensor]]:
    return [models.inputs(4, 12, seed=seed) for seed in range(n)]


@torch.no_grad()
def sparsity(model, data) -> tuple[float, list[float]]:
    meter = SparsityMeter(len(sparse_ffns(model)))
    with observe_routing(model, meter):
        for batch in data:
            meter.set_token_mask(batch["attention_mask"].bool())
            model(**batch)
    return meter.overall, meter.per_layer


@pytest.mark.parametrize("target", [0.2, 0.5, 0.9])
def test_one_threshold_for_all_layers_reaches_the_sparsity(target):
    model = sparse_model().eval()
    point = lte.calibrate(model, batches(), target)
    reached, _ = sparsity(model, batches())
    assert reached == pytest.approx(target, abs=0.005)
    assert reached == pytest.approx(point.sparsity, abs=1e-6)
    assert len(set(point.thresholds)) == 1
    assert thresholds_of(model) == list(point.thresholds)


def test_per_layer_reaches_it_in_every_layer():
    model = sparse_model().eval()
    lte.calibrate(model, batches(), 0.6, per_layer=True)
    assert sparsity(model, batches())[1] == pytest.approx([0.6] * models.LAYERS, abs=0.01)


def test_one_kind_of_threshold_is_not_taken_for_the_other():
    model = sparse_model().eval()
    sparse_ffns(model)[0].router.weight.data.mul_(5)
    lte.calibrate(model, batches(), 0.6)
    apart = sparsity(model, batches())[1]
    assert max(apart) - min(apart) > 0.05
    lte.calibrate(model, batches(), 0.6, per_layer=True)
    assert sparsity(model, batches())[1] == pytest.approx([0.6] * models.LAYERS, abs=0.005)
    point = lte.calibrate(model, batches(), 0.6)
    assert len(set(point.thresholds)) == 1
    assert sparsity(model, batches())[1] == pytest.approx(apart, abs=0.01)


def test_operating_points_are_of_one_kind():
    model = sparse_model().eval()
    for target in (0.3, 0.7):
        lte.calibrate(model, batches(), target)
    lte.calibrate(model, batches(), 0.5, per_layer=True)
    points = model.config.quantization_config.operating_points
    assert [(round(point.sparsity, 1), point.per_layer) for point in points] == [(0.5, True)]


def test_padding_does_not_count():
    model, data = sparse_model().eval(), batches(1)
    padded = {k: torch.cat([v, torch.zeros(4, 30, dtype=v.dtype)], dim=1) for k, v in data[0].items()}
    alone = lte.calibrate(model, data, 0.5).thresholds
    assert lte.calibrate(model, [padded], 0.5).thresholds == pytest.approx(alone, abs=1e-6)


def test_the_dial_goes_through_its_points_and_between_them():
    model = sparse_model().eval()
    for target in (0.7, 0.3):
        lte.calibrate(model, batches(), target)
    for wanted in (0.3, 0.4, 0.5, 0.7):  # the ends too, though what was reached there is not exactly that
        model.set_sparsity(wanted)
        assert sparsity(model, batches())[0] == pytest.approx(wanted, abs=0.03)
    for outside in (0.1, 0.95):
        with pytest.raises(ConfigError, match="outside of what the model was calibrated for"):
            model.set_sparsity(outside)


def test_a_second_calibration_of_a_sparsity_replaces_the_first():
    model = sparse_model().eval()
    for data in (batches(1), batches(4)):
        lte.calibrate(model, data, 0.5)
    assert len(model.config.quantization_config.operating_points) == 1


def test_points_and_thresholds_survive_saving(tmp_path):
    model = sparse_model().eval()
    for target in (0.3, 0.7):
        lte.calibrate(model, batches(), target)
    model.set_sparsity(0.6)
    model.save_pretrained(tmp_path)
    loaded = lte.load(tmp_path)
    assert thresholds_of(loaded) == thresholds_of(model)
    assert sparsity(loaded, batches()) == sparsity(model, batches())
    before = thresholds_of(loaded)
    for copied in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        copied.set_sparsity(0.35)
        assert thresholds_of(copied) != before
    assert thresholds_of(loaded) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"thresholds": [0.5, 0.5]}, "unknown key 'thresholds'"),
        (
            {"operating_points": [{"sparsity": 0.5, "sparsity_per_layer": [0.5], "thresholds": [0.5]}]},
            "1 thresholds for 2",
        ),
        (
            {"operating_points": [{"sparsity": 0.5, "sparsity_per_layer": [0.5], "thresholds": [2.0]}]},
            "thresholds.0=2.0",
        ),
        ({"operating_points": [{"sparsity": 0.5, "sparsity_per_layer": [0.5, 0.5]}]}, "thresholds is missing"),
    ],
)
def test_edited_thresholds_are_refused(tmp_path, change, message):
    model = sparse_model()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        lte.load(tmp_path)


def test_what_cannot_be_reached_leaves_the_model_as_it_was():
    model = sparse_model().eval()
    for ffn in sparse_ffns(model):  # every score the same
        torch.nn.init.zeros_(ffn.router.weight)
    before = thresholds_of(model)
    with pytest.raises(CalibrationError, match=r"sparsity 0.5 cannot be reached by moving thresholds"):
        lte.calibrate(model, batches(1), 0.5)
    assert thresholds_of(model) == before


def test_an_interruption_leaves_the_model_as_it_was():
    model = sparse_model().eval()
    before = thresholds_of(model)

    def interrupt(done: int, total: int) -> None:
        if thresholds_of(model) != before:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lte.calibrate(model, batches(), 0.9, progress=interrupt)
    assert thresholds_of(model) == before


def test_a_dense_model_has_no_dial():
    for ask in (lambda model: lte.calibrate(model, batches(1), 0.5), lambda model: lte.set_sparsity(model, 0.5)):
        with pytest.raises(ConfigError, match=r"LlamaForCausalLM is dense and has no thresholds.*lte.sparsify"):
            ask(models.build("llama"))


def test_bad_requests():
    model = sparse_model()
    with pytest.raises(ConfigError, match="no operating points; make some: lte calibrate"):
        model.set_sparsity(0.5)
    with pytest.raises(ConfigError, match=r"target sparsity 1.0 must lie between 0 and 1"):
        lte.calibrate(model, batches(1), 1.0)
    with pytest.raises(ConfigError, match="sparsity='0.5' must be a number"):
        model.set_sparsity("0.5")
    with pytest.raises(ConfigError, match="3 thresholds were given for 2"):
        set_thresholds(model, [0.5] * 3)
    config = lte.TopKConfig(expert_size=models.EXPERT, grouping="random")
    with pytest.raises(
        ConfigError, match="TopKSoftmaxRouter has no threshold to calibrate: it always runs the same share"
    ):
        lte.calibrate(lte.sparsify(models.build("llama"), config), batches(1), 0.5)


KEY = "model.layers.{}.mlp.router._extra_state"


def test_thresholds_are_in_the_state_dict_and_nowhere_else(tmp_path):
    """Moved by hand, they are copied, cast, saved and loaded as they are."""
    config = lte.LTEConfig(expert_size=8, grouping="random", router_init="random")
    model = lte.sparsify(models.build("llama"), config)
    sparse_ffns(model)[0].router.threshold = 0.7
    sparse_ffns(model)[1].router.fine = 1 / 3
    state = model.state_dict()
    assert read_thresholds(state[KEY.format(0)]) == (0.7, None, 1.0)
    assert read_thresholds(state[KEY.format(1)]) == (0.5, 1 / 3, 1.0)
    other = lte.sparsify(models.build("llama"), config).half()
    other.load_state_dict(state)
    assert thresholds_of(other) == [0.7, 0.5]
    copied = copy.deepcopy(model)
    sparse_ffns(copied)[0].router.threshold = 0.3
    assert thresholds_of(model) == [0.7, 0.5]
    model.half().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert "thresholds" not in json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    for loaded in (lte.load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)):
        assert thresholds_of(loaded) == [0.7, 0.5]
        assert sparse_ffns(loaded)[1].router.fine == 1 / 3
    with pytest.raises(RuntimeError, match="Missing key.*router._extra_state"):
        model.load_state_dict({key: value for key, value in state.items() if "_extra_state" not in key})


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([0.0, 0.0, 1.0], "threshold=0.0 of a router must lie between 0 and 1"),
        ([float("nan"), 0.0, 1.0], "threshold=nan"),
        ([0.5, float("inf"), 1.0], "fine=inf of a router must lie between"),
        ([0.5, 0.0, 1.5], "fine_share=1.5"),
        ([0.5], "three numbers of int64, not torch.int64"),
    ],
)
def test_impossible_thresholds_are_refused(tmp_path, numbers, message):
    model = sparse_model()
    with pytest.raises(CheckpointError, match=message):
        sparse_ffns(model)[0].router.set_extra_state(torch.tensor(numbers, dtype=torch.float64).view(torch.int64))
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors[KEY.format(1)] = torch.tensor(numbers, dtype=torch.float64).view(torch.int64)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        lte.load(tmp_path)


@pytest.mark.parametrize("shards", ["10MB", "20KB"])
def test_thresholds_are_written_into_the_files_of_the_weights(tmp_path, shards, monkeypatch):
    model = sparse_model()
    model.save_pretrained(tmp_path, max_shard_size=shards)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    set_thresholds(model, [0.3, 1 / 7])

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            save_thresholds(tmp_path, model)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    other = tmp_path / "model-00000-of-00099.safetensors"  # of some other saving, loaded by nobody
    other.write_bytes(next(tmp_path.glob("*.safetensors")).read_bytes())
    save_thresholds(tmp_path, model)
    other.unlink()
    after = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert after.keys() == before.keys()
    changed = sum(a != b for name in before for a, b in zip(before[name], after[name], strict=True))
    assert 0 < changed <= 2 * 8
    loaded = lte.load(tmp_path)
    assert thresholds_of(loaded) == [0.3, 1 / 7]
    assert torch.equal(loaded(**models.inputs(2, 8)).logits, model.eval()(**models.inputs(2, 8)).logits)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no weights with layers.0.mlp.router._extra_state"):
        save_thresholds(tmp_path / "empty", model)
