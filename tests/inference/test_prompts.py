"""Prompts of prepared models: many tokens at once."""

from __future__ import annotations

import copy

import pytest
import torch

import lte
from lte.inference import restore
from lte.nn import SparsityMeter, observe_routing, set_mode, sparse_ffns
from lte.ops import SMALL_BATCH, cpu
from tests import models

LONG = SMALL_BATCH + 9
needs_kernels = pytest.mark.skipif(bool(cpu.unavailable()), reason=cpu.unavailable() or "kernels built")


def by_neuron():
    model = lte.sparsify(models.build("llama"), lte.SelfPredictionConfig(group=32), calibration=[models.inputs(4, 12)])
    lte.calibrate(model, [models.inputs(4, 12)], 0.6)
    return model.eval()


@torch.no_grad()
def logits(model, length: int = LONG, **options):
    return model(input_ids=models.inputs(1, length)["input_ids"], **options).logits


@needs_kernels
def test_of_single_neurons_prompts_run_all():
    model = by_neuron()
    masked = logits(model)
    set_mode(dense := copy.deepcopy(model), "dense")
    fast = lte.prepare_for_inference(copy.deepcopy(model))
    torch.testing.assert_close(logits(fast), logits(dense), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(fast), masked, atol=1e-3)
    torch.testing.assert_close(logits(fast, SMALL_BATCH), logits(model, SMALL_BATCH), atol=1e-4, rtol=1e-4)
    many = models.inputs(SMALL_BATCH + 6, 3)["input_ids"]  # texts that are short, however many
    with torch.no_grad():
        torch.testing.assert_close(fast(many).logits, model(many).logits, atol=1e-4, rtol=1e-4)
    meter = SparsityMeter(len(sparse_ffns(fast)))
    meter.set_token_mask(None)
    with observe_routing(fast, meter):
        torch.testing.assert_close(logits(fast), masked, atol=1e-4, rtol=1e-4)
    assert meter.overall > 0.3
    restore(fast)
    torch.testing.assert_close(logits(fast), masked, atol=1e-4, rtol=1e-4)
    fast = lte.prepare_for_inference(copy.deepcopy(model), mask_prompts=True)
    torch.testing.assert_close(logits(fast), masked, atol=1e-4, rtol=1e-4)


@needs_kernels
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_of_experts_prompts_leave_out_the_same(family):
    config = lte.LTEConfig(expert_size=16, grouping="random", router_init="random")
    model = lte.sparsify(models.build(family), config).eval()
    models.spread_routers(model)
    fast = lte.prepare_for_inference(copy.deepcopy(model), impl="cpu")
    batch = models.inputs(4, 30)
    batch["attention_mask"][1:, :7] = 0
    batch.pop("labels", None)
    with torch.no_grad():
        keep = batch["attention_mask"].bool()
        torch.testing.assert_close(fast(**batch).logits[keep], model(**batch).logits[keep], atol=1e-4, rtol=1e-4)
