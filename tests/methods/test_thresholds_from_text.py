"""Thresholds and quantiles of methods that are not trained: on other text, and as their papers take them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import lte
from lte.nn import SparsityMeter, observe_routing, sparse_ffns
from lte.thresholds import find_thresholds, thresholds_of
from tests import models
from tests.methods.test_every_method import first_inputs, made, routed
from tests.smollm2 import needs_gguf, needs_smollm2, smollm2_file
from tests.training.common import trainer

DOCS = Path(__file__).parents[2] / "docs"


def test_teal_keeps_its_sparsity_on_other_text():
    seen, other = models.inputs(64, 32, seed=1), models.inputs(64, 32, seed=2)
    model = lte.sparsify(models.build("llama"), lte.TEALConfig(sparsity=0.5), calibration=[seen]).eval()
    assert routed(model, other)[1] == pytest.approx(0.5, abs=0.01)


@pytest.mark.slow
@needs_gguf
@needs_smollm2
def test_teal_keeps_its_sparsity_on_text_that_a_real_model_has_not_seen():
    file = str(smollm2_file())
    text = "".join(path.read_text() for path in sorted(DOCS.glob("*.md")))
    ids = torch.tensor(lte.load_tokenizer(file)(text)["input_ids"][: 64 * 128]).view(64, 128)
    rows = ids[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    seen, other = ({"input_ids": part, "attention_mask": torch.ones_like(part)} for part in rows.chunk(2))
    meter = SparsityMeter(3)
    model = lte.sparsify(
        lte.load_dense(file), lte.TEALConfig(sparsity=0.5, layers=(0, 12, 29)), calibration=[seen]
    ).eval()
    meter.set_token_mask(other["attention_mask"].bool())
    with torch.no_grad(), observe_routing(model, meter):
        model(**other)
    assert meter.overall == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("method", ["cats", "countdown", "sparseinfer"])
def test_thresholds_as_published_are_quantiles_of_every_layer(method, tmp_path):
    model, batch = made(method, "opt" if method == "sparseinfer" else "llama"), models.inputs(8, 16)
    coarse = method == "sparseinfer"  # its scores are counts
    point = find_thresholds(model, [batch], 0.6)
    assert point.per_layer
    routings, _ = routed(model, batch)
    shares = [1 - float(routing.mask.float().mean()) for routing in routings.values()]
    assert shares == pytest.approx([0.6] * models.LAYERS, abs=0.05 if coarse else 0.01)
    if method == "cats":  # by hand
        ffn, x = sparse_ffns(model)[0], first_inputs(model)
        sizes = F.silu(x @ ffn.gate_proj.weight.T).abs()
        kept = ffn.router(x).mask
        assert sizes[kept].min() >= sizes[~kept].max()
    model.save_pretrained(tmp_path)
    again = lte.load(str(tmp_path))
    assert again.config.quantization_config.method.per_layer
    assert thresholds_of(again) == thresholds_of(model)
    assert not find_thresholds(model, [batch], 0.6, per_layer=False).per_layer


def test_a_training_keeps_one_threshold_for_all_layers(tmp_path):
    run = trainer(tmp_path, made("cats"), target_sparsity=0.5)
    run.train()
    assert len(set(thresholds_of(run.model))) == 1
    assert not run.landed.per_layer
    assert find_thresholds(run.model, [models.inputs(8, 16)], 0.6).per_layer
