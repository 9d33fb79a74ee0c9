"""Standard tasks: the harness' numbers for a dense model, one result by either door, and what it costs beside it."""

from __future__ import annotations

import json
import sys
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager
from typer.testing import CliRunner

import lm_eval
import lte
from lte.accounting import model_cost
from lte.cli import app
from lte.errors import CheckpointError, ConfigError, DataError, LTEError
from lte.lm_eval import LTEModel, TaskSet, evaluate_tasks
from lte.lm_eval.__main__ import main
from tests import models
from tests.tasks.tiny import byte_tokenizer, tiny_llama

RECIPES = Path(__file__).parents[2] / "recipes" / "tasks"
WORDS = ["cat", "dog", "sat", "on", "a", "mat", "bird", "saw", "rain", "and"]

COMMON: dict[str, Any] = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1.0}}
LAST_WORD = {
    "task": "last_word",
    "output_type": "loglikelihood",
    "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
    "doc_to_target": "{{' '+text.split(' ')[-1]}}",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
    ],
}
CHOICE = {
    "task": "choice",
    "output_type": "multiple_choice",
    "fewshot_split": "test",
    "doc_to_text": "{{text}} ->",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
ANSWER = {
    "task": "answer",
    "output_type": "generate_until",
    "doc_to_text": "{{text}}",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["zz"], "max_gen_toks": 4, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
ALL = "last_word,choice,answer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Task files, their data, and a model, dense and sparse."""
    root = tmp_path_factory.mktemp("harness")
    rows = [
        {
            "text": " ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 4 + i % 4)),
            "choices": [WORDS[i % 10], f"{WORDS[(i + 3) % 10]} {WORDS[(i + 4) % 10]}"],
            "answer": i % 2,
        }
        for i in range(1, 13)
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "tasks").mkdir()
    for task in (LAST_WORD, CHOICE, ANSWER):
        config = {**COMMON, **task, "dataset_kwargs": {"data_files": {"test": str(root / "rows.jsonl")}}}
        (root / "tasks" / f"{task['task']}.yaml").write_text(yaml.safe_dump(config))
    tiny_llama().save_pretrained(root / "dense")
    model = lte.sparsify(
        tiny_llama(), lte.LTEConfig(expert_size=8, grouping="random", router_init="random", threshold=0.5)
    )
    models.spread_routers(model)
    model.save_pretrained(root / "sparse")
    for name in ("dense", "sparse"):
        byte_tokenizer().save_pretrained(root / name)
    return root


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def evaluate(folder: Path, name: str, *more: object, tasks: str = ALL) -> dict[str, Any]:
    out = folder / "result.json"
    result = run(
        *("evaluate", folder / name, "--tasks", tasks, "--include-path", folder / "tasks", "--json", out, *more)
    )
    assert result.exit_code == 0, result.output + repr(result.exception)
    return json.loads(out.read_text())


def fails(*words: object) -> str:
    result = run(*words)
    assert isinstance(result.exception, LTEError), result.output + repr(result.exception)
    return " ".join(str(result.exception).split())


def harness(folder: Path, name: str, kind: str, **options: Any) -> dict[str, Any]:
    """The harness' own evaluation, as its Python users call it."""
    found = lm_eval.simple_evaluate(
        model=kind,
        model_args={"pretrained": str(folder / name), "dtype": "float32", **options},
        tasks=ALL.split(","),
        task_manager=TaskManager(include_path=folder / "tasks", include_defaults=False),
        batch_size=1,
        device="cpu",
    )
    return found["results"]


def numbers(results: dict[str, Any]) -> dict[str, float]:
    return {
        f"{task} {key}": value
        for task, found in results.items()
        for key, value in found.items()
        if "," in key and isinstance(value, float)
    }


def test_a_dense_model_has_the_numbers_of_the_harness(folder):
    theirs = numbers(harness(folder, "dense", "hf"))
    ours = numbers(evaluate(folder, "dense", "--dense", "--batch-size", 5)["harness"]["results"])
    assert len(theirs) >= 8
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_sparse_model_has_the_numbers_of_the_slow_path(folder):
    """The harness' own model type runs the sparse model too, once lte is imported, on padding and without packing."""
    theirs = numbers(harness(folder, "sparse", "hf"))
    ours = evaluate(folder, "sparse")
    assert numbers(ours["harness"]["results"]) == pytest.approx(theirs, rel=1e-4)
    dense = evaluate(folder, "dense", "--dense", tasks="last_word")
    assert ours["extras"]["last_word perplexity"] != pytest.approx(dense["extras"]["perplexity"], rel=1e-3)


def test_the_harness_command_gives_the_same_as_lte_evaluate(folder, tmp_path, monkeypatch):
    words = f"run --model lte --model_args pretrained={folder / 'sparse'} --tasks {ALL} --batch_size 4 --device cpu"
    words += f" --include_path {folder / 'tasks'} --output_path {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["lm_eval", *words.split()])
    monkeypatch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))
    main()
    (file,) = tmp_path.rglob("results_*.json")
    monkeypatch.undo()
    theirs = json.loads(file.read_text())
    ours = evaluate(folder, "sparse", "--batch-size", 7)
    assert numbers(ours["harness"]["results"]) == pytest.approx(numbers(theirs["results"]), rel=1e-6)
    recorded = theirs["config"]["lte"]
    assert recorded["sparsity"] == pytest.approx(ours["sparsity"])
    assert recorded["tokens"] == ours["tokens"]


def test_sparsity_and_flops_stand_beside_the_results(folder):
    result = evaluate(folder, "sparse", "--baseline", folder / "dense", "--limit", 6, tasks="choice")
    cost = model_cost(lte.load(folder / "sparse"))
    assert 0.2 < result["sparsity"] < 0.8
    assert len(result["sparsity_per_layer"]) == 2
    assert result["gflops_per_token"] == pytest.approx(cost.gflops_per_token(result["sparsity_per_layer"]))
    assert result["gflops_per_token"]["sparse"] < result["gflops_per_token"]["dense"]
    assert (result["metric"], result["value"]) == ("acc", result["harness"]["results"]["choice"]["acc,none"])
    assert "acc_norm" in result["extras"]
    assert result["baseline"]["sparsity"] == 0.0
    # Only what is run is counted: each context with each choice, once, without its last token.
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()][:6]
    expected = sum(len(f"{row['text']} -> {choice}") - 1 for row in rows for choice in row["choices"])
    assert result["tokens"] == result["baseline"]["tokens"] == expected
    assert result["harness"]["n-samples"]["choice"]["effective"] == 6


def test_fewshot_examples_come_into_the_prompt(folder):
    none, two = (evaluate(folder, "sparse", "--num-fewshot", n, tasks="choice") for n in (0, 2))
    assert two["tokens"] > 2 * none["tokens"]
    assert two["harness"]["n-shot"] == {"choice": 2}


def test_a_task_file_needs_no_include_path(folder):
    loaded = TaskSet([str(folder / "tasks" / "last_word.yaml")])
    model = LTEModel(str(folder / "sparse"), batch_size=4)
    result = evaluate_tasks(model, loaded, limit=3)
    assert result["harness"]["tasks"] == ["last_word"]
    assert result["data"] == str(folder / "rows.jsonl")
    assert model.get_model_info()["lte"]["sparsity"] == result["sparsity"]


def test_an_unknown_task_is_named_with_what_was_searched(folder, monkeypatch):
    monkeypatch.setattr("lte.lm_eval.tasks.TaskManager", _without_defaults)
    words = ["evaluate", folder / "dense", "--dense", "--tasks", "last_wort"]
    error = fails(*words, "--include-path", folder / "tasks")
    assert "unknown task 'last_wort'; did you mean 'last_word'?" in error
    assert f"3 task files in --include-path {folder / 'tasks'}" in error
    assert "no --include-path was given" in fails(*words)
    assert "no task file 'nowhere.yaml'" in fails(*words[:-1], "nowhere.yaml")
    assert "is no folder" in fails(*words, "--include-path", folder / "nowhere")


def _without_defaults(**options: Any) -> TaskManager:
    """Indexing the harness' own tasks takes seconds."""
    return TaskManager(**{**options, "include_defaults": False})


def test_data_or_tasks_but_one_of_them(folder):
    assert "neither was given" in fails("evaluate", folder / "sparse")
    assert "both were given" in fails("evaluate", folder / "sparse", "--tasks", "choice", "--data", "x.txt")
    assert "--stride 4 does not go with --tasks" in fails(
        *("evaluate", folder / "sparse", "--tasks", "choice", "--stride", 4)
    )
    assert "--num-fewshot 1 does not go with --data" in fails(
        *("evaluate", folder / "sparse", "--data", "x.txt", "--num-fewshot", 1)
    )


def test_a_dense_model_is_not_taken_for_a_sparse_one(folder):
    with pytest.raises(CheckpointError, match="is a dense checkpoint"):
        LTEModel(str(folder / "dense"))
    with pytest.raises(CheckpointError, match="is a sparse checkpoint"):
        LTEModel(str(folder / "sparse"), dense=True)
    with pytest.raises(ConfigError, match="unknown model argument spasity=0.5; did you mean 'sparsity'"):
        LTEModel(str(folder / "sparse"), spasity=0.5)


def test_data_that_is_not_there_is_an_error_before_the_model_is_loaded(folder, tmp_path):
    config = {**COMMON, **LAST_WORD, "dataset_kwargs": {"data_files": {"test": str(tmp_path / "none.jsonl")}}}
    (tmp_path / "gone.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(DataError, match=r"none\.jsonl.*relative to the working directory"):
        TaskSet([str(tmp_path / "gone.yaml")]).load()


def test_the_lambada_recipe(folder, tmp_path, monkeypatch):
    data = tmp_path / "shared" / "data" / "lambada"
    data.mkdir(parents=True)
    (data / "test.jsonl").write_text('{"text": "a cat sat on a mat"}\n{"text": "a dog saw a bird"}\n')
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (task,) = TaskSet(["lambada_openai"], RECIPES).load()
    docs = list(task.test_docs())
    assert task.doc_to_text(docs[0]) == "a cat sat on a"
    assert task.doc_to_target(docs[0]) == " mat"


def test_the_mmlu_recipe(tmp_path, monkeypatch):
    """All subjects in one file, each with its own rows and number."""
    text = (RECIPES / "mmlu.yaml").read_text().replace("!function ", "")
    subjects = [item["metadata"]["subject"] for field in yaml.safe_load(text)["task"] for item in field["task"]]
    assert len(set(subjects)) == 57
    data = tmp_path / "shared" / "data" / "mmlu"
    data.mkdir(parents=True)
    rows = [
        {"subject": name, "question": f" What of {name}? ", "choices": ["w", "x", "y", "z"], "answer": 2}
        for name in ("us_foreign_policy", "anatomy")
    ]
    for split in ("test", "dev"):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = yaml.safe_load(text)
    config["task"] = [
        {**field, "task": [item for item in field["task"] if item["task"] in ("us_foreign_policy", "anatomy")]}
        for field in config["task"]
        if field["group"] in ("stem", "social_sciences")
    ]
    shortened = yaml.safe_dump(config).replace("mmlu_rows.of_subject", "!function mmlu_rows.of_subject")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mmlu.yaml").write_text(shortened)
    (tmp_path / "tasks" / "mmlu_rows.py").write_text((RECIPES / "mmlu_rows.py").read_text())
    monkeypatch.setattr("lte.lm_eval.tasks.TaskManager", _without_defaults)
    (group,) = TaskSet(["mmlu"], tmp_path / "tasks").load()
    tasks = {task.task_name: task for task in group.get_all_tasks()}
    assert set(tasks) == {"mmlu::stem::anatomy", "mmlu::social_sciences::us_foreign_policy"}
    task = tasks["mmlu::social_sciences::us_foreign_policy"]
    (doc,) = task.test_docs()
    assert task.fewshot_context(doc, num_fewshot=0) == (
        "The following are multiple choice questions (with answers) about us foreign policy.\n\n"
        "What of us_foreign_policy?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    )
    assert task.doc_to_target(doc) == 2
