from __future__ import annotations

import json

import pytest
import yaml
from typer.testing import CliRunner

from lte.cli import app
from lte.errors import ConfigError, DataError
from lte.report.figures import tradeoff_figure
from lte.report.studies import read_rows
from lte.study import chosen_points, load_study, points
from tests.locks import held_elsewhere
from tests.test_cli import folder  # noqa: F401 - a fixture

SERIES = {
    "dense": {"command": "finetune", "set": {"training.max_steps": 2}, "grid": {"seed": [0, 1]}},
    "a, sparse": {
        "set": {"training.max_steps": 3},
        "grid": {"seed": [0, 1], "training.target_sparsity": [0.5]},
        "dial": [0.3],
    },
}


def write(tmp_path, **changes):
    study = {
        "results": str(tmp_path / "results"),
        "work": str(tmp_path / "work"),
        "base": {"model": "m", "data": "d.txt", "task": {"name": "lm", "context_length": 16}},
        "evaluate": {"data": "d.txt", "context_length": 8},
        "series": SERIES,
        **changes,
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return tmp_path / "study.yaml"


def test_points_are_all_combinations_and_take_turns(tmp_path):
    names = [point.name for point in points(load_study(write(tmp_path)))]
    assert names == [
        "dense-seed=0",
        "a-sparse-seed=0-target_sparsity=0.5",
        "dense-seed=1",
        "a-sparse-seed=1-target_sparsity=0.5",
    ]


def test_parts_share_a_study(tmp_path):
    study = load_study(write(tmp_path))
    parts = [{point.name for point in chosen_points(study, part=f"{i}/3")} for i in (1, 2, 3)]
    assert set.union(*parts) == {point.name for point in points(study)}
    assert sum(map(len, parts)) == 4
    with pytest.raises(ConfigError, match="part='3/2' must be of the form i/n"):
        chosen_points(study, part="3/2")
    with pytest.raises(ConfigError, match="no point of the study is called 'x'; there are dense-seed=0"):
        chosen_points(study, only="x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate": {"limit": 3}}, "evaluate.data is missing"),
        ({"evaluate": {"data": "d", "limt": 3}}, "did you mean 'limit'"),
        ({"evaluate": {"data": "d", "batch_size": "x"}}, "evaluate.batch_size='x' must be a whole number from 1"),
        (
            {"evaluate": {"data": "d", "decode_tokens": 10**9}},
            "evaluate.decode_tokens=1000000000 must be a whole number",
        ),
        ({"series": {"a": {**SERIES["a, sparse"], "dial": [2.0]}}}, "dial"),
        ({"series": {"a": {"set": {"training.etaa": 1}}}}, "did you mean 'eta'"),
        ({"series": {"a b": SERIES["dense"], "a,b": SERIES["dense"]}}, "two points are called 'a-b-seed=0'"),
        ({"series": {"a": {**SERIES["dense"], "dial": [0.5]}}}, "'a' is dense and has no dial"),
        (
            {
                "series": {
                    "a": {
                        "set": {
                            "sparsity": {"method": "softmax-topk", "sparsity": 0.3},
                            "training.target_sparsity": 0.5,
                        }
                    }
                }
            },
            "target_sparsity=0.5 and sparsity.sparsity=0.3: give one",
        ),
    ],
)
def test_a_mistake_in_a_study_is_found_before_anything_runs(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_study(write(tmp_path, **changes))


def test_bad_studies(tmp_path):
    with pytest.raises(ConfigError, match="unknown key 'evaluat'; did you mean 'evaluate'"):
        load_study(write(tmp_path, evaluat={}))
    with pytest.raises(ConfigError, match="no recipe file"):
        load_study(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="unknown key 'modle'"):
        load_study(write(tmp_path, base={"model": "m", "data": "d", "task": "lm", "modle": 1}))


def test_evaluation_data_are_looked_for_before_anything_is_trained(tmp_path, folder):  # noqa: F811
    flags = ("--task", "lm", "--data", folder / "text.txt", "--context-length", 16, "--methods", "kla")
    words = ["compare", "--model", folder / "dense", *flags, "--sparsities", 0.5, "--steps", 1, "--decode-tokens", 0]
    words = [str(word) for word in (*words, "--out", tmp_path / "out")]
    result = CliRunner().invoke(app, [*words, "--eval-data", str(tmp_path / "no.txt")])
    assert isinstance(result.exception, DataError)
    assert not (tmp_path / "out").exists()
    assert CliRunner().invoke(app, [*words, "--eval-data", str(folder / "text.txt")]).exit_code == 0
    study = write(tmp_path, base={"model": str(folder / "dense"), "data": str(folder / "text.txt"), "task": "lm"})
    assert isinstance(CliRunner().invoke(app, ["sweep", str(study)]).exception, DataError)
    assert not (tmp_path / "work").exists()


def test_a_sweep_runs_what_is_missing_and_the_rows_average_over_seeds(tmp_path, folder):  # noqa: F811
    base = {"model": str(folder / "dense"), "data": str(folder / "text.txt"), "task": {"name": "lm"}}
    base["task"]["context_length"] = 16
    series = {**SERIES, "a, sparse": {**SERIES["a, sparse"]}}
    series["a, sparse"]["set"] = {"training.max_steps": 3, "sparsity.expert_size": 8}
    scored = {"data": str(folder / "text.txt"), "context_length": 16}
    file = write(tmp_path, base=base, evaluate=scored, series=series)
    first = CliRunner().invoke(app, ["sweep", str(file), "--only", "*seed=0*"])
    assert first.exit_code == 0, first.output + repr(first.exception)
    stamp = (tmp_path / "results" / "dense-seed=0.json").stat().st_mtime_ns
    rest = CliRunner().invoke(app, ["sweep", str(file)])
    assert "2 points run" in rest.output
    assert (tmp_path / "results" / "dense-seed=0.json").stat().st_mtime_ns == stamp
    assert not list((tmp_path / "work").iterdir())
    assert "nothing to run" in CliRunner().invoke(app, ["sweep", str(file)]).output
    found = read_rows(tmp_path / "results")
    assert [(row.series, row.setting, row.seeds) for row in found] == [
        ("dense", "", 2),
        ("a, sparse", "target_sparsity 0.5, dial 0.3", 2),
        ("a, sparse", "target_sparsity 0.5", 2),
    ]
    assert found[1].sparsity.mean == pytest.approx(30, abs=5)
    record = json.loads((tmp_path / "results" / "a-sparse-seed=1-target_sparsity=0.5.json").read_text())
    assert record["training"]["recipe"]["training"]["target_sparsity"] == 0.5
    assert record["settings"] == {"seed": 1, "training.target_sparsity": 0.5}
    tradeoff_figure(found, "a study", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_processes_share_a_study(tmp_path, folder):  # noqa: F811
    """Each point is run once; what is at work is passed over, a model that others start from is waited for."""
    base = {"model": str(folder / "dense"), "data": str(folder / "text.txt"), "task": {"name": "lm"}}
    base["task"]["context_length"] = 16
    scored = {"data": str(folder / "text.txt"), "context_length": 16}
    series = {"dense": SERIES["dense"], "kla": {"command": "sparsify", "set": {"sparsity.method": "kla"}}}
    series["kla"]["grid"] = {"sparsity.sparsity": [0.3, 0.5]}
    file = write(tmp_path, base=base, evaluate=scored, series=series)
    (tmp_path / "results").mkdir()
    busy = tmp_path / "results" / "kla-sparsity=0.3.lock"
    with held_elsewhere(busy) as owner:
        first = CliRunner().invoke(app, ["sweep", str(file)])
    assert first.exit_code == 0, first.output
    assert f"process {owner} on" in first.output
    assert "3 points run" in first.output
    assert "1 points run" in CliRunner().invoke(app, ["sweep", str(file)]).output
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        *("dense-seed=0.json", "dense-seed=1.json", "kla-sparsity=0.3.json", "kla-sparsity=0.5.json"),
    ]
