from __future__ import annotations

import copy

import pytest
import torch

import lte
from lte.errors import ConfigError, NonFiniteLossError
from lte.nn import sparse_ffns
from tests import models
from tests.training.common import rows, sparse_model, trainer


def router_weights(model) -> list[torch.Tensor]:
    return [ffn.router.weight.detach().clone() for ffn in sparse_ffns(model)]


def step_gradients(tmp_path, model=None, data=None, **settings) -> dict[str, torch.Tensor]:
    """Gradients of the first optimiser step of stage 1, over the same eight padded rows however they are split."""
    data = rows(8, padded=True) if data is None else data
    run = trainer(tmp_path, model, data, stage1_steps=1, stage2_steps=0, max_grad_norm=0.0, eta=3.0, **settings)
    for module in run.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    kept: dict[str, torch.Tensor] = {}

    def keep() -> None:
        kept.update({n: p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None})

    run.check_gradients = keep  # called when the gradients of a step are complete
    run.train()
    return kept


def assert_same_gradients(left: dict, right: dict, tolerance: float) -> None:
    assert left.keys() == right.keys()
    assert left
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=tolerance, rtol=tolerance, msg=name)


def test_both_stages_run_in_their_modes(tmp_path):
    run = trainer(tmp_path)
    seen = []
    original = run.training_step

    def watch(model, *args):
        seen.append(str(sparse_ffns(model)[0].mode))
        return original(model, *args)

    run.training_step = watch
    run.train()
    assert seen == ["soft"] * 3 + ["hard"] * 3
    assert [str(ffn.mode) for ffn in sparse_ffns(run.model)] == ["hard"] * models.LAYERS


def test_routers_train_in_stage_one_and_are_frozen_in_stage_two(tmp_path):
    run = trainer(tmp_path, weight_decay=0.1)
    start, at_switch, model_at_switch = router_weights(run.model), [], {}
    original = run.enter_step

    def watch():
        if run.state.global_step == run.plan.stage1_steps:
            at_switch.extend(router_weights(run.model))
            model_at_switch.update(copy.deepcopy(run.model.state_dict()))
        original()

    run.enter_step = watch
    run.train()
    end = router_weights(run.model)
    assert all(not torch.equal(a, b) for a, b in zip(start, at_switch, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(at_switch, end, strict=True))
    moved = run.model.state_dict()
    assert any(not torch.equal(moved[key], value) for key, value in model_at_switch.items())


def test_routers_have_their_own_group(tmp_path):
    run = trainer(tmp_path, router_learning_rate=0.5, router_weight_decay=0.25, weight_decay=0.0)
    optimizer = run.create_optimizer()
    groups = [(len(g["params"]), g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert groups[2] == (2 * models.LAYERS, 0.5, 0.25)
    assert sum(n for n, _, _ in groups) == len(list(run.model.parameters()))


def test_learning_rate_starts_anew_in_stage_two(tmp_path):
    run = trainer(tmp_path, stage1_steps=4, stage2_steps=4, warmup_steps=0.0, stage2_learning_rate=5e-4)
    run.train()
    rates = [record["learning_rate"] for record in run.state.log_history if "learning_rate" in record]
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4, 5e-4, 3.75e-4, 2.5e-4, 1.25e-4])


def test_gradient_accumulation_gives_the_gradients_of_one_large_batch(tmp_path):
    """Rows of different lengths: losses are averaged over the tokens of the step, not over micro-batches."""
    whole = step_gradients(tmp_path, per_device_train_batch_size=8)
    split = step_gradients(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert_same_gradients(whole, split, 1e-6)


def test_gradient_accumulation_of_a_classifier(tmp_path):
    """A task loss that is a mean over rows; the auxiliary losses still average over tokens."""

    def gradients(**settings):
        data = rows(8, padded=True).remove_columns("labels").add_column("labels", [0, 1, 2, 0, 1, 2, 0, 1])
        model = sparse_model("bert")
        return step_gradients(tmp_path, model=model, data=data.with_format("torch"), **settings)

    whole = gradients(per_device_train_batch_size=8)
    assert_same_gradients(whole, gradients(per_device_train_batch_size=2, gradient_accumulation_steps=4), 1e-6)


def test_auxiliary_losses_reach_the_routers(tmp_path):
    gradients = step_gradients(tmp_path, per_device_train_batch_size=8)
    assert all(gradient.abs().sum() > 0 for name, gradient in gradients.items() if ".router." in name)


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path):
    plain = step_gradients(tmp_path, per_device_train_batch_size=8)
    checkpointed = step_gradients(tmp_path, per_device_train_batch_size=8, gradient_checkpointing=True)
    assert_same_gradients(plain, checkpointed, 1e-6)


def test_reentrant_checkpointing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"use_reentrant=True is refused: .* would not reach the routers"):
        trainer(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    model = sparse_model()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ConfigError, match="use_reentrant=True is refused"):
        trainer(tmp_path, model=model).train()


def test_bf16(tmp_path):
    run = trainer(tmp_path, bf16=True)
    run.train()
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


def test_bf16_weights(tmp_path):
    run = trainer(tmp_path, model=sparse_model().to(torch.bfloat16))
    run.train()
    assert {p.dtype for n, p in run.model.named_parameters() if ".router." not in n} == {torch.bfloat16}
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


def test_routers_of_a_bf16_model_move_by_steps_that_bf16_would_lose(tmp_path):
    model = sparse_model().to(torch.bfloat16)
    with torch.no_grad():
        for ffn in sparse_ffns(model):
            ffn.router.weight.copy_(ffn.router.weight.bfloat16())
    start = router_weights(model)
    run = trainer(tmp_path, model, stages=1, router_learning_rate=1e-6, router_weight_decay=0.0)
    run.train()
    for before, after in zip(start, router_weights(run.model), strict=True):
        typical = before.abs() > before.abs().mean() / 2
        assert (after != before)[typical].float().mean() > 0.9
        assert torch.equal(after.bfloat16()[typical], before.bfloat16()[typical])


def test_every_step_is_logged(tmp_path):
    run = trainer(tmp_path, data=rows(padded=True), eta=2.0, eta_warmup=1.0, lambda_start=0.0, lambda_full=0.0)
    run.train()
    records = [record for record in run.state.log_history if "task_loss" in record]
    assert [record["stage"] for record in records] == [1, 1, 1, 2, 2, 2]
    assert [record["eta"] for record in records[:3]] == pytest.approx([2 / 3, 4 / 3, 2])
    for record in records:
        layers = [record[f"sparsity/layer_{i}"] for i in range(models.LAYERS)]
        assert record["sparsity"] == pytest.approx(sum(layers) / models.LAYERS, abs=1e-4)
        assert record["efficiency_loss"] > 0
        assert 2 <= record["separability_loss"] <= 4
    first, last = records[0], records[-1]
    expected = first["task_loss"] + first["eta"] * first["efficiency_loss"] + 0.5 * first["separability_loss"]
    assert first["loss"] == pytest.approx(expected, rel=1e-3)
    assert last["loss"] == pytest.approx(last["task_loss"], rel=1e-3)


def test_lambda_rises_between_its_two_shares(tmp_path):
    run = trainer(tmp_path, stage1_steps=10, stage2_steps=0, eta=0.0, lambda_start=0.3, lambda_full=0.8)
    run.train()
    factors = [
        (record["loss"] - record["task_loss"]) / (0.5 * record["separability_loss"])
        for record in run.state.log_history
        if "task_loss" in record
    ]
    assert factors == pytest.approx([0, 0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1], abs=1e-3)


def test_larger_eta_is_sparser(tmp_path):
    def final(eta: float) -> float:
        run = trainer(tmp_path, model=sparse_model(), stage1_steps=40, stage2_steps=1, eta=eta, lambda_sep=0.0)
        run.train()
        return run.state.log_history[-2]["sparsity"]

    assert final(100.0) > final(0.0) + 0.2


def test_nan_loss_stops_and_keeps_the_last_checkpoint(tmp_path):
    run = trainer(tmp_path, save_strategy="steps", save_steps=2)
    original = run.enter_step

    def poison():
        original()
        if run.state.global_step == 4:
            with torch.no_grad():
                next(run.model.parameters()).fill_(float("nan"))

    run.enter_step = poison
    with pytest.raises(NonFiniteLossError, match=r"stopped at step 5 \(stage 2\): task loss nan.*checkpoint-4"):
        run.train()
    lte.load(tmp_path / "checkpoint-4")


def test_infinite_gradient_stops_before_the_weights_are_spoilt(tmp_path):
    run = trainer(tmp_path)
    next(run.model.parameters()).register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(NonFiniteLossError, match="the gradient norm is"):
        run.train()
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


def test_dense_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="needs a sparse model"):
        trainer(tmp_path, model=models.build("llama"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"eta": -1.0}, "eta=-1.0 must not be negative"),
        ({"eta_warmup": 2.0}, r"eta_warmup=2.0 is a share, in \[0, 1\]"),
        ({"sep_epsilon": 0.0}, "sep_epsilon=0.0 must be above 0"),
        ({"lambda_start": 0.5, "lambda_full": 0.2}, "lambda_start=0.5 is after lambda_full"),
        ({"max_steps": 5, "stages": 2}, "max_steps=5 needs stages=1; give stage1_steps, stage2_steps"),
        ({"stage1_steps": 5}, "stage1_steps=5 needs stages=2; one stage takes num_train_epochs or max_steps"),
        ({"stages": 3}, "stages=3 must be 1, or 2"),
        ({"anneal": 0.5, "stages": 2}, "anneal=0.5 needs stages=1"),
        ({"target_sparsity": 1.0, "eta": None}, "target_sparsity=1.0 must lie between 0 and 1"),
        ({"target_sparsity": 0.5, "eta": 1.0}, "target_sparsity=0.5 and eta=1.0: give one of the two"),
        ({"eta": None}, "target_sparsity=None and eta=None: give one of the two"),
    ],
)
def test_settings_out_of_range(tmp_path, setting, message):
    with pytest.raises(ConfigError, match=message):
        lte.LTETrainingArguments(
            output_dir=str(tmp_path), **{"eta": None if "target_sparsity" in setting else 1.0, **setting}
        )
