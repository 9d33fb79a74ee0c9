from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch

import lte
from lte.errors import ConfigError
from lte.nn import sparse_ffns
from lte.thresholds import thresholds_of
from lte.training import SparsityTracker
from tests import models
from tests.training.common import collate, rows, self_predicted, sparse_model, trainer


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("target", [0.3, 0.8])
def test_a_model_lands_on_its_target(tmp_path, stages, target):
    steps = {"max_steps": 40} if stages == 1 else {"stage1_steps": 25, "stage2_steps": 15}
    model = sparse_model(router_init_score=0.5)
    rates = {"learning_rate": 1e-4, "router_learning_rate": 1e-2, "per_device_train_batch_size": 16}
    run = trainer(tmp_path, model, rows(640), stages=stages, target_sparsity=target, lambda_sep=0.0, **rates, **steps)
    run.train()
    training = [record["sparsity"] for record in run.state.log_history if "sparsity" in record]
    assert training[-1] == pytest.approx(target, abs=0.05)  # step by step
    held_out = rows(640, seed=6)
    batch = {key: torch.stack(list(held_out[key])) for key in ("input_ids", "attention_mask")}
    meter = lte.SparsityMeter(models.LAYERS)
    meter.set_token_mask(batch["attention_mask"].bool())
    with torch.no_grad(), lte.observe_routing(run.model, meter):
        run.model.eval()(**batch)
    assert meter.overall == pytest.approx(target, abs=0.01)  # after the last move
    assert str(sparse_ffns(run.model)[0].mode) == "hard"


def test_frozen_routers_are_answered_with_thresholds(tmp_path):
    run = trainer(tmp_path, stages=1, target_sparsity=0.7, router_learning_rate=0.0, max_steps=30)
    before = [ffn.router.weight.detach().clone() for ffn in sparse_ffns(run.model)]
    run.train()
    assert all(torch.equal(a, ffn.router.weight) for a, ffn in zip(before, sparse_ffns(run.model), strict=True))
    assert all(threshold > 0.5 for threshold in thresholds_of(run.model))


@pytest.mark.parametrize("settings", [{"stages": 1, "max_steps": 8}, {"stage1_steps": 4, "stage2_steps": 4}])
@pytest.mark.parametrize(
    "make",
    [partial(sparse_model, "gpt2"), self_predicted, partial(self_predicted, "gpt2", learned=True)],
    ids=["lte", "self-prediction", "learned self-prediction"],
)
@pytest.mark.parametrize("stop", [2, 6, 8])
def test_a_resumed_run_has_the_same_tracker_and_ends_at_the_same_weights(tmp_path, settings, stop, make):
    settings = {"target_sparsity": 0.5, "save_strategy": "steps", "save_steps": 2, "lambda_sep": 0.0, **settings}
    whole = trainer(tmp_path / "whole", make(), **settings)
    whole.train()
    state = json.loads((tmp_path / "whole" / f"checkpoint-{stop}" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["StepCallback"]["attributes"]["tracker"]["sparsity"] > 0
    again = trainer(tmp_path / "again", make(), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert again.tracker == whole.tracker
    assert thresholds_of(again.model) == thresholds_of(whole.model)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


@pytest.mark.parametrize("asked", [{"eta": 1.0}, {"target_sparsity": 0.5, "lambda_sep": 0.1}])
def test_losses_that_would_reach_nothing_are_refused(tmp_path, asked):
    asked = {"lambda_sep": 0.0, **asked}
    with pytest.raises(ConfigError, match=r"acts on the scores, and nothing learns from these; give --target-sparsity"):
        trainer(tmp_path, self_predicted(), stages=1, **asked)
    trainer(tmp_path, self_predicted(learned=True), stages=1, **asked)


def test_accumulated_steps_give_the_tracker_the_same_reading(tmp_path):
    readings = []
    for size, accumulation in ((8, 1), (2, 4)):
        run = trainer(
            tmp_path,
            data=rows(8, padded=True),
            stages=1,
            max_steps=1,
            target_sparsity=0.5,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        run.train()
        readings.append(run.tracker.sparsity)
    assert readings[0] == pytest.approx(readings[1], abs=1e-6)


@pytest.mark.parametrize("rate", [0.0, 1e-2])
def test_the_same_tokens_are_run_before_and_after_the_weights_move(tmp_path, rate, monkeypatch):
    data = rows(4, padded=True)
    run = trainer(
        tmp_path,
        data=data,
        stages=1,
        max_steps=3,
        target_sparsity=0.5,
        learning_rate=rate,
        router_learning_rate=rate,
        per_device_train_batch_size=4,
    )
    looks, moves = [], []
    monkeypatch.setattr(SparsityTracker, "look", lambda self, before: looks.append(before))
    monkeypatch.setattr(SparsityTracker, "move", lambda self, after, ramp: moves.append(after) or 0.0)
    monkeypatch.setattr(SparsityTracker, "waited", property(lambda self: 0, lambda self, steps: None), raising=False)
    run.train()
    assert len(looks) == len(moves) == 3
    probes = list(zip(looks, moves, strict=True))
    tokens = sum(int(row["attention_mask"].sum()) for row in data)
    for before, after in probes:
        assert before.seen.tolist() == after.seen.tolist() == [tokens * 8] * models.LAYERS
    moved = [not torch.equal(before.counts, after.counts) for before, after in probes[1:]]
    assert moved == [rate > 0] * 2


def test_an_annealed_gate_hardens(tmp_path):
    run = trainer(tmp_path, stages=1, max_steps=4, target_sparsity=0.5, anneal=1.0)
    seen = []
    original = run.leave_step
    run.leave_step = lambda: (seen.append(sparse_ffns(run.model)[0].hardness), original())
    run.train()
    assert seen == [0.25, 0.5, 0.75, 1.0]


def test_distillation_needs_a_teacher_and_is_the_divergence_from_it(tmp_path):
    with pytest.raises(ConfigError, match=r"distill=0.5 needs the dense model"):
        trainer(tmp_path, stages=1, target_sparsity=0.5, distill=0.5)
    model = sparse_model("llama", router_init_score=0.999, router_init_std=0.0)  # computes what the dense one does
    args = lte.LTETrainingArguments(
        output_dir=str(tmp_path), max_steps=1, eta=0.0, distill=1.0, logging_steps=1, use_cpu=True, disable_tqdm=True
    )
    run = lte.LTETrainer(model=model, args=args, teacher=models.build("llama"), train_dataset=rows())
    run.train()
    first = next(record for record in run.state.log_history if "task_loss" in record)
    assert first["task_loss"] == pytest.approx(0.0, abs=1e-5)


def test_the_divergence_is_that_of_the_next_tokens_that_count(tmp_path):
    model, teacher, data = sparse_model("llama"), models.build("llama", seed=7), rows(8, padded=True)
    batch = {key: torch.stack(list(data[key])) for key in ("input_ids", "attention_mask", "labels")}
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        wanted, found = teacher(**inputs).logits.double(), copy.deepcopy(model)(**inputs).logits.double()
    terms = [
        float((w.softmax(-1) * (w.log_softmax(-1) - f.log_softmax(-1))).sum())
        for row, labels in enumerate(batch["labels"].tolist())
        for w, f, label in zip(wanted[row], found[row], labels[1:], strict=False)
        if label != -100
    ]
    seen = []
    for size, accumulation in ((8, 1), (2, 4)):
        args = lte.LTETrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            eta=0.0,
            distill=1.0,
            logging_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        run = lte.LTETrainer(
            model=copy.deepcopy(model), args=args, teacher=teacher, train_dataset=data, data_collator=collate
        )
        run.train()
        seen.append(next(record["task_loss"] for record in run.state.log_history if "task_loss" in record))
    assert seen == pytest.approx([sum(terms) / len(terms)] * 2, rel=1e-4)


def test_a_teacher_must_be_dense_and_have_something_to_say(tmp_path):
    model = sparse_model()
    args = lte.LTETrainingArguments(output_dir=str(tmp_path), eta=0.0, distill=0.5, use_cpu=True)
    with pytest.raises(ConfigError, match="a copy of its own"):
        lte.LTETrainer(model=model, args=args, teacher=model, train_dataset=rows())
    teacher = models.build("bert")
    teacher.config.problem_type = "regression"
    with pytest.raises(ConfigError, match="has one output"):
        lte.LTETrainer(model=model, args=args, teacher=teacher, train_dataset=rows())


def test_training_on_forgets_the_old_operating_points(tmp_path):
    model = sparse_model(router_init_score=0.5)
    lte.calibrate(model, [models.inputs(4, 12)], 0.3)
    run = trainer(tmp_path, model, stages=1, max_steps=2, target_sparsity=0.6)
    run.train()
    assert [point.sparsity for point in model.config.quantization_config.operating_points] == [run.landed.sparsity]


def test_a_top_k_router_has_no_target(tmp_path):
    config = lte.TopKConfig(expert_size=models.EXPERT, grouping="random", sparsity=0.5)
    with pytest.raises(ConfigError, match="target_sparsity needs routers with a threshold"):
        trainer(tmp_path, lte.sparsify(models.build("llama"), config), stages=1, target_sparsity=0.5)
    run = trainer(tmp_path, lte.sparsify(models.build("llama"), config), stages=1, eta=0.0, lambda_sep=0.0)
    run.train()
    readings = [record["sparsity"] for record in run.state.log_history if "sparsity" in record]
    assert readings == pytest.approx([0.5] * 6)


def test_a_start_sparser_than_the_target_is_opened_first(tmp_path):
    run = trainer(
        tmp_path, sparse_model(router_init_score=0.5), stages=1, max_steps=2, target_sparsity=0.2, lambda_sep=0.0
    )
    run.train()
    first = next(record for record in run.state.log_history if "sparsity" in record)
    assert first["sparsity"] == pytest.approx(0.2, abs=0.06)  # random routers at a score of 0.5 leave out half


def test_unused_columns_do_not_disturb_the_last_move(tmp_path):
    data = rows().add_column("note", ["text"] * 24)
    run = trainer(tmp_path, sparse_model(router_init_score=0.5), data, stages=1, max_steps=2, target_sparsity=0.6)
    run.train()
    assert run.landed.sparsity == pytest.approx(0.6, abs=0.01)
