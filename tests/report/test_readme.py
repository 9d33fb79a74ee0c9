from __future__ import annotations

import json
from pathlib import Path

import pytest

from lte.report.readme import fill

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["README.md", "docs/training.md", "docs/inference.md"])
def test_figures_in_the_pages_are_those_in_results(page):
    text = (ROOT / page).read_text()
    assert fill(text, ROOT / "results") == text, "run `python -m lte.report.readme`"
    assert "sparsity |" in text


def test_every_result_has_a_recipe_and_a_command():
    for path in (ROOT / "results").glob("*/*.json"):
        # A speed is measured by a command alone; quality is that of a run, which has a recipe.
        recipe = ROOT / "recipes" / path.parent.name / f"{path.stem}.yaml"
        assert path.parent.name == "speed" or recipe.is_file(), path
        assert json.loads(path.read_text())["command"].startswith("lte "), path
