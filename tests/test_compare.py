from __future__ import annotations

import csv
import json

import pytest
import yaml

from lte import study
from lte.compare import Entry, design
from lte.config import METHODS
from tests.test_cli import fails, folder, run  # noqa: F401 - a fixture


@pytest.fixture
def words(folder, tmp_path):  # noqa: F811
    data = ("--model", folder / "dense", "--task", "lm", "--data", folder / "text.txt")
    return ("compare", *data, "--eval-data", folder / "text.txt", "--context-length", 16, "--out", tmp_path / "c")


def test_it_compares_goes_on_and_takes_more(words, tmp_path, monkeypatch):
    """Interrupted in the third of five points, the same command goes on; then a method more."""
    more = (
        "--methods",
        "self-prediction,kla",
        "--sparsities",
        "0.5,0.75",
        "--steps",
        2,
        "--set",
        "self-prediction.group=32",
    )
    real, done = study.run_point, []

    def interrupted(point, of):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(point.name)
        return real(point, of)

    monkeypatch.setattr(study, "run_point", interrupted)
    result = run(*words, *more)
    assert result.exit_code == 130
    assert "the same command goes on with the points that are missing" in result.output
    assert done == ["dense-seed=0", "self-prediction-seed=0-target_sparsity=0.5"]
    assert (tmp_path / "c" / "report.html").is_file()
    monkeypatch.setattr(study, "run_point", real)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "c" / "points").iterdir()}

    result = run(*words, *more)
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert "3/5 kla" in result.output
    assert "5/5 kla" in result.output
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    with (tmp_path / "c" / "points.csv").open() as file:
        rows = {(row["method"], row["target_sparsity"]): row for row in csv.DictReader(file)}
    assert set(rows) == {("dense", ""), *((name, s) for name in ("self-prediction", "kla") for s in ("0.5", "0.75"))}
    assert float(rows["kla", "0.75"]["sparsity"]) == pytest.approx(0.75)
    assert [rows[name, "0.5"]["steps"] for name in ("self-prediction", "kla")] == ["2", "0"]
    assert float(rows["self-prediction", "0.5"]["decode_ms_per_token"]) > 0
    assert rows["self-prediction", "0.5"]["decode_path"] in ("fused step", "masked dense")
    assert rows["dense", ""]["decode_ms_per_token"] == ""
    assert float(rows["dense", ""]["decode_ms_transformers"]) > 0
    assert 0 < float(rows["kla", "0.75"]["linear_sparsity"]) < 0.75
    assert rows["kla", "0.75"]["version"]
    point = json.loads((tmp_path / "c" / "points" / "kla-seed=0-target_sparsity=0.5.json").read_text())
    assert (point["method"], point["target_sparsity"], point["steps"]) == ("kla", 0.5, 0)
    assert point["training"]["recipe"]["model"].endswith("dense-seed=0")  # what is not trained is applied to the tuned
    page = (tmp_path / "c" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page.replace("http-equiv", "")
    assert [path.name for path in (tmp_path / "c" / "models").iterdir()] == ["dense-seed=0"]

    result = run(*words, *more[:1], "self-prediction,kla,dejavu:trained", *more[2:])
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert "7/7 dejavu" in result.output
    assert "| dejavu:trained | 0.75 |" in (tmp_path / "c" / "table.md").read_text()
    assert "holds a comparison with another task" in fails(*words, *more, "--context-length", 8)
    assert "'kla' with other settings or steps" in fails(*words, *more, "--set", "kla.expert_size=2")
    assert "holds a comparison with another training" in fails(*words, *more, "--learning-rate", "1e-3")


def test_without_steps_and_evaluation_data(words, folder, tmp_path):  # noqa: F811
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": f"one two three {i}"}) for i in range(200)))
    out = tmp_path / "held"
    plain = (*words[:5], "--data", tmp_path / "rows.jsonl", "--context-length", 16, "--out", out)
    result = run(*plain, "--methods", "cats", "--sparsities", "0.5")
    assert result.exit_code == 0, result.output + repr(result.exception)
    held = [json.loads(line)["text"] for line in (out / "data" / "held-out.jsonl").read_text().splitlines()]
    assert held == [f"one two three {i}" for i in range(0, 200, 10)]
    assert len((out / "data" / "train.jsonl").read_text().splitlines()) == 180
    dense = json.loads((out / "points" / "dense-seed=0.json").read_text())
    assert dense["sparsity"] == 0
    assert (folder / "dense").is_dir()
    (tmp_path / "others.jsonl").write_text((tmp_path / "rows.jsonl").read_text())
    for data in (tmp_path / "others.jsonl", "nowhere.jsonl"):
        other = (*words[:5], "--data", data, "--context-length", 16, "--out", out)
        message = fails(*other, "--methods", "cats,kla", "--sparsities", "0.5")
        assert f"{out} holds a comparison on {tmp_path / 'rows.jsonl'}, not {data}; use another --out" in message
    (tmp_path / "few.jsonl").write_text('{"text": "one"}\n')
    few = (*words[:5], "--data", tmp_path / "few.jsonl", "--out", tmp_path / "x")
    assert "too few to hold some out" in fails(*few, "--methods", "cats", "--sparsities", "0.5")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--methods", "magic", "--sparsities", "0.5"), "unknown method 'magic'; known methods"),
        (("--methods", "kla:tuned", "--sparsities", "0.5"), "after a method's name comes :trained or :untrained"),
        (("--methods", "kla:trained", "--sparsities", "0.5"), "'kla:trained' needs steps to train for"),
        (("--methods", "kla,kla", "--sparsities", "0.5"), "one is named twice"),
        (("--methods", "kla", "--sparsities", "50"), "sparsity 50.0 must lie between 0 and 1"),
        (("--methods", ",", "--sparsities", "0.5"), "at least one of --methods"),
        (("--methods", "kla", "--sparsities", "0.5", "--steps", -1), "steps must not be negative"),
        (("--methods", "kla", "--sparsities", "0.5", "--steps", 2, "--dense-steps", 2), "must be fewer than steps=2"),
        (("--methods", "kla", "--sparsities", "0.5", "--set", "kla.size=2"), "unknown key 'size'"),
        (("--methods", "kla", "--sparsities", "0.5", "--set", "training.etaa=2"), "did you mean 'eta'"),
        (("--methods", "kla", "--sparsities", "0.5,0.50"), "sparsities: one is given twice in 0.5, 0.5"),
        (
            ("--methods", "kla", "--sparsities", "0.5", "--set", "teal.attention=true"),
            "is of no method of this comparison",
        ),
        (("--methods", "dejavu:untrained", "--sparsities", "0.5", "--set", "dejavu.no=7"), "unknown key 'no'"),
        (
            ("--methods", "kla", "--sparsities", "0.5", "--data", "nowhere.jsonl"),
            "nowhere.jsonl: no such file or folder",
        ),
    ],
)
def test_a_mistake_is_found_before_anything_is_written(words, tmp_path, more, message):
    assert message in fails(*words, *more)
    assert not (tmp_path / "c").exists()


def test_a_folder_of_something_else_is_left_alone(words, tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine.txt").write_text("keep")
    assert "holds no comparison" in fails(*words, "--methods", "kla", "--sparsities", "0.5")
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["mine.txt"]


def test_what_is_trained_is_said_or_known():
    assert Entry.parse("cats", 5) == Entry("cats", "cats", False)
    assert Entry.parse("dejavu:trained", 5) == Entry("dejavu:trained", "dejavu", True)
    assert Entry.parse("self-prediction:untrained", 5).trained is False
    assert Entry.parse("lte", 5).trained is True
    assert Entry.parse("lte", 0).trained is False


def test_the_first_steps_may_be_dense_once_for_all(words, tmp_path):
    more = ("--methods", "self-prediction,lte-paper,kla", "--sparsities", "0.5", "--steps", 5, "--dense-steps", 2)
    result = run(*words, *more, "--decode-tokens", 0)
    assert result.exit_code == 0, result.output + repr(result.exception)
    points = [json.loads(file.read_text()) for file in (tmp_path / "c" / "points").iterdir()]
    steps = {point["series"]: (point["steps"], point["training"]["recipe"]["model"]) for point in points}
    start, tuned = (str(tmp_path / "c" / "models" / f"{name}-seed=0") for name in ("dense-first", "dense"))
    assert steps.pop("dense-first")[0] == 2
    assert steps == {"dense": (3, start), "self-prediction": (3, start), "lte-paper": (3, start), "kla": (0, tuned)}


def test_its_study_can_be_swept(tmp_path):
    base = {"model": "m", "data": "d.txt", "task": {"name": "lm"}}
    made = design(base, methods=["lte"], sparsities=[0.5], steps=3, seeds=2, eval_data="e.txt", out=tmp_path / "c")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(made))
    names = [point.name for point in study.points(study.load_study(tmp_path / "study.yaml"))]
    assert names == [
        "dense-seed=0",
        "lte-seed=0-target_sparsity=0.5",
        "dense-seed=1",
        "lte-seed=1-target_sparsity=0.5",
    ]


PLUGIN = """
import torch
from lte.config import Method, MethodConfig, register_method
from lte.nn import Router, RouterCost


class FirstConfig(MethodConfig):
    method = "first"
    expert_size: int = 1
    grouping: str = "none"


class FirstRouter(Router):
    def __init__(self, n_experts, device):
        super().__init__(n_experts)
        self.gain = torch.nn.Parameter(torch.empty(n_experts, device=device, dtype=torch.float32))

    def cost(self):
        return RouterCost(self.n_experts, self.gain.nbytes, self.n_experts)

    def forward(self, x):
        return self.decide(x[..., :1].float().abs() * self.gain)


@register_method(FirstConfig)
class First(Method):
    decides = "the first number of an input"

    def make_router(self, d_model, n_experts, like):
        return FirstRouter(n_experts, like.device)

    def init_routers(self, ffns, calibration, generator):
        for ffn in ffns:
            ffn.router.gain.data = torch.randn(ffn.router.n_experts, generator=generator)
"""


def test_a_method_of_one_file_outside_is_trained_saved_loaded_and_compared(words, folder, tmp_path):  # noqa: F811
    (tmp_path / "first_plugin.py").write_text(PLUGIN)
    plugin = ("--plugin", tmp_path / "first_plugin.py")
    try:
        result = run(*plugin, *words, "--methods", "first,first:untrained", "--sparsities", "0.5", "--steps", 2)
        assert result.exit_code == 0, result.output + repr(result.exception)
        table = (tmp_path / "c" / "table.md").read_text()
        assert "| first | 0.5 |" in table
        assert "| first:untrained | 0.5 |" in table
        out = ("--data", folder / "text.txt", "--task", "lm", "--context-length", 16, "--out", tmp_path / "m")
        made = run(
            "sparsify", "--model", folder / "dense", *out, "--set", "sparsity.method=first", "--target-sparsity", 0.5
        )
        assert made.exit_code == 0, made.output + repr(made.exception)
        again = run(*plugin, "evaluate", tmp_path / "m", "--data", folder / "text.txt")
        assert again.exit_code == 0, again.output + repr(again.exception)
    finally:
        METHODS.pop("first", None)
    assert "--plugin nowhere.py cannot be imported: FileNotFoundError" in fails("--plugin", "nowhere.py", "methods")


def test_a_method_that_cannot_serve_the_model_is_refused_before_anything_runs(words, tmp_path):
    said = fails(*words, "--methods", "kla,sparseinfer", "--sparsities", "0.5", "--steps", 2)
    assert "sparseinfer: method='sparseinfer' is for FFNs with a ReLU, and this model's have 'silu'" in said
    assert not (tmp_path / "c" / "points").exists()
    said = fails(*words, "--methods", "lte", "--sparsities", "0.5", "--set", "lte.expert_size=7")
    assert "lte: d_ff=" in said


def test_one_method_with_two_settings(words, tmp_path):
    result = run(
        *words,
        *("--methods", "moefication,known=moefication:untrained", "--sparsities", "0.5", "--decode-tokens", 0),
        *("--set", "known.router=oracle", "--set", "known.expert_size=8", "--set", "moefication.expert_size=8"),
    )
    assert result.exit_code == 0, result.output + repr(result.exception)
    point = json.loads((tmp_path / "c" / "points" / "known-seed=0-target_sparsity=0.5.json").read_text())
    assert point["method"] == "moefication"
    assert point["training"]["recipe"]["sparsity"] == {"method": "moefication", "router": "oracle", "expert_size": 8}
    assert "a name must not be empty, 'dense', 'dense-first' or have dots" in fails(
        *words, "--methods", "dense=kla", "--sparsities", "0.5"
    )


def test_a_setting_of_a_method_is_of_all_its_entries_but_for_those_that_have_their_own(tmp_path):
    study = design(
        {"model": "m"},
        methods=["svd", "svd:trained", "small=svd"],
        sparsities=[0.5],
        steps=1,
        seeds=1,
        eval_data="text.txt",
        out=tmp_path,
        settings=[("small", "rank", 2), ("svd", "rank", 4)],
    )
    ranks = {name: series["set"].get("sparsity.rank") for name, series in study["series"].items()}
    assert ranks == {"dense": None, "svd": 4, "svd:trained": 4, "small": 2}


def test_patterns_of_wanda_are_no_numbers_of_base_60(words, tmp_path):
    result = run(
        *words, "--methods", "wanda", "--sparsities", "0.5", "--set", "wanda.pattern=2:4", "--decode-tokens", 0
    )
    assert result.exit_code == 0, result.output + repr(result.exception)
    (file,) = (tmp_path / "c" / "points").glob("wanda*.json")
    point = json.loads(file.read_text())
    assert point["training"]["recipe"]["sparsity"]["pattern"] == "2:4"
    assert point["sparsity"] == pytest.approx(0.5, abs=1e-6)


def test_tasks_of_the_harness_stand_beside(words, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": f"one two three {i}"}) for i in range(20)))
    task = {
        "task": "last",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "output_type": "loglikelihood",
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "doc_to_target": " four",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "last.yaml").write_text(yaml.safe_dump(task))
    more = ("--methods", "kla", "--sparsities", "0.5", "--decode-tokens", 0, "--include-path", tmp_path / "tasks")
    assert "--tasks: unknown task 'nothing'" in fails(*words, *more, "--tasks", "nothing")
    assert "evaluate.tasks: limit='few'" in fails(*words, *more, "--tasks", "last:limit=few")
    result = run(*words, *more, "--tasks", "last:limit=3")
    assert result.exit_code == 0, result.output + repr(result.exception)
    point = json.loads((tmp_path / "c" / "points" / "kla-seed=0-target_sparsity=0.5.json").read_text())
    assert point["tasks"]["last"]["limit"] == 3
    assert 0 <= point["tasks"]["last"]["value"] <= 1
    assert point["tasks"]["last"]["sparsity"] == pytest.approx(0.5)
    assert "| last acc |" in (tmp_path / "c" / "table.md").read_text()
    assert "decode" not in point
