from __future__ import annotations

from pathlib import Path

from lte.report.readme import fill

ROOT = Path(__file__).parents[2]


def test_figures_in_the_readme_are_those_in_results():
    readme = (ROOT / "README.md").read_text()
    assert fill(readme, ROOT / "results") == readme, "run `python -m lte.report.readme`"
    assert "| FFN sparsity |" in readme


def test_every_result_has_a_recipe_and_a_command():
    import json

    for path in (ROOT / "results").glob("*/*.json"):
        assert (ROOT / "recipes" / path.parent.name / f"{path.stem}.yaml").is_file(), path
        assert json.loads(path.read_text())["command"].startswith("lte "), path
