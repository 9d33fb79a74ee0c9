"""The extension point: a method made up here, in one file, goes everywhere a built-in one does."""

from __future__ import annotations

import pytest
import torch

import lte
from lte.accounting import model_cost
from lte.config import METHODS, Method, MethodConfig, register_method
from lte.errors import CheckpointError, ConfigError
from lte.nn import Router, RouterCost, sparse_ffns
from lte.training import LTETrainingArguments
from tests import models
from tests.training.common import rows


class HalvesConfig(MethodConfig):
    """Neurons whose activation in one half of the input is large: a setting, a buffer, and the FFN's own weights."""

    method = "halves"
    share: float = 0.5


class HalvesRouter(Router):
    def __init__(self, d_model: int, n_experts: int, share: float, device: torch.device) -> None:
        super().__init__(n_experts)
        self.d_half = int(share * d_model)
        self.gain = torch.nn.Parameter(torch.empty(n_experts, device=device, dtype=torch.float32))

    def attach(self, ffn) -> None:
        self.ffn = [ffn]

    def cost(self) -> RouterCost:
        return RouterCost(self.d_half * self.n_experts, self.d_half * self.n_experts * 4, self.n_experts)

    def forward(self, x):
        up = self.ffn[0].weights().up[:, : self.d_half]
        return self.decide((x[..., : self.d_half].float() @ up.float().T).abs() * self.gain - 1)


@pytest.fixture
def halves():
    @register_method(HalvesConfig)
    class Halves(Method[HalvesConfig]):
        def make_router(self, d_model, n_experts, like):
            return HalvesRouter(d_model, n_experts, self.config.share, like.device)

        def init_routers(self, ffns, calibration, generator):
            for ffn in ffns:
                torch.nn.init.constant_(ffn.router.gain, 3.0)

    yield HalvesConfig(expert_size=1, grouping="random", share=0.25)
    del METHODS["halves"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_method_of_one_file_is_calibrated_saved_loaded_and_counted(halves, name, tmp_path):
    model = lte.sparsify(models.build(name), halves).eval()
    batch = models.inputs(4, 12)
    point = lte.calibrate(model, [batch], 0.5)
    assert point.sparsity == pytest.approx(0.5, abs=0.02)
    model.save_pretrained(tmp_path)
    loaded = lte.load(tmp_path).eval()
    assert isinstance(sparse_ffns(loaded)[1].router, HalvesRouter)
    assert loaded.config.quantization_config.method == halves
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)
    cost = model_cost(loaded)
    assert {layer.router for layer in cost.layers} == {RouterCost(8 * 64, 8 * 64 * 4, 64)}
    assert cost.gflops_per_token([0.5, 0.5])["router"] * 2**30 == 2 * 2 * 8 * 64


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_the_fast_path_is_given_its_mask(halves, name):
    model = lte.sparsify(models.build(name), halves).eval()
    batch = models.inputs(1, 2)
    lte.calibrate(model, [batch], 0.5)
    with torch.no_grad():
        wanted = model(**batch).logits
        lte.prepare_for_inference(model)
        torch.testing.assert_close(model(**batch).logits, wanted, atol=1e-4, rtol=1e-3)


def test_its_training_is_held_at_the_target(halves, tmp_path):
    model = lte.sparsify(models.build("llama"), halves)
    args = LTETrainingArguments(
        output_dir=str(tmp_path), target_sparsity=0.5, max_steps=6, use_cpu=True, disable_tqdm=True, report_to=[]
    )
    trainer = lte.LTETrainer(model=model, args=args, train_dataset=rows(64))
    trainer.train()
    assert trainer.on_target
    assert not torch.equal(sparse_ffns(model)[0].router.gain, torch.full((64,), 3.0))


@pytest.mark.parametrize("name", sorted(models.CONFIGS))
def test_layers_that_are_not_named_stay_dense(name, tmp_path):
    config = lte.LTEConfig(expert_size=8, grouping="random", router_init="random", router_init_score=0.5, layers=(1,))
    dense = models.build(name)
    kept = {key for key in dense.state_dict() if ".1." not in key}
    model = lte.sparsify(dense, config).eval()
    assert len(sparse_ffns(model)) == 1
    assert kept <= model.state_dict().keys()
    meter = lte.SparsityMeter(1)
    batch = models.inputs(2, 5)
    meter.set_token_mask(torch.ones(2, 5, dtype=torch.bool))
    with torch.no_grad(), lte.observe_routing(model, meter):
        wanted = model(**batch)[0]
    assert 0 < meter.overall < 1
    model.save_pretrained(tmp_path)
    loaded = lte.load(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch)[0], wanted)
        lte.prepare_for_inference(loaded)
        torch.testing.assert_close(loaded(**batch)[0], wanted, atol=1e-4, rtol=1e-3)


def test_layers_that_do_not_exist_are_named(tmp_path):
    with pytest.raises(ConfigError, match="there is no block 7; the model has 2, from 0 to 1"):
        lte.sparsify(
            models.build("llama"), lte.LTEConfig(expert_size=8, layers=[0, 7], grouping="kmeans", router_init="random")
        )
    with pytest.raises(ConfigError, match="layers"):
        lte.LTEConfig(layers=[])
    with pytest.raises(ConfigError, match="layers"):
        lte.LTEConfig(layers=[-1])


def test_an_unknown_method_in_a_checkpoint_is_named(halves, tmp_path):
    model = lte.sparsify(models.build("llama"), halves)
    model.save_pretrained(tmp_path)
    known = METHODS.pop("halves")
    try:
        with pytest.raises(CheckpointError, match="unknown method 'halves'; known methods: bank-topk, cats"):
            lte.load(tmp_path)
    finally:
        METHODS["halves"] = known
