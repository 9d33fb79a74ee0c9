from __future__ import annotations

import json
from pathlib import Path

import pytest

from lte.report.readme import fill
from lte.study import load_study, points

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "page",
    ["README.md", *(f"docs/{name}.md" for name in ("training", "self-prediction", "inference", "precision", "study"))],
)
def test_figures_in_the_pages_are_those_in_results(page):
    text = (ROOT / page).read_text()
    assert fill(text, ROOT / "results") == text, "run `python -m lte.report.readme`"
    assert "sparsity % |" in text or "sparsity |" in text


def test_every_point_of_a_study_belongs_to_it():
    for folder in [*(ROOT / "results" / "compare").glob("*/"), *(ROOT / "results" / "ablations").glob("*/")]:
        study = load_study(ROOT / "recipes" / folder.parent.name / f"{folder.name}.yaml")
        names = {name for p in points(study) for name in (p.name, *(f"{p.name}-dial={dial}" for dial in p.dial))}
        assert {path.stem for path in folder.glob("*.json")} <= names


def test_every_result_has_a_recipe_and_a_command():
    for path in (ROOT / "results").glob("*/*.json"):
        # A speed is measured by a command alone; quality is that of a run, which has a recipe.
        recipe = ROOT / "recipes" / path.parent.name / f"{path.stem}.yaml"
        assert path.parent.name in ("speed", "gpu") or recipe.is_file(), path
        assert json.loads(path.read_text())["command"].startswith("lte "), path
