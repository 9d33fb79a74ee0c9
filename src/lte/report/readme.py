"""Fill the marked blocks of README.md and docs/ from results/: ``python -m lte.report.readme``."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

TITLES = {
    "stories": "A 3.1 M-parameter LLaMA trained to saturation, TinyStories",
    "e2e": "A 3.3 M-parameter LLaMA trained from scratch, E2E NLG",
    "sst2": "MiniLM (BERT, 22 M parameters), SST-2",
}
"""Folder of results -> what its rows are about."""

METRICS = {"perplexity": "perplexity", "rougeL": "ROUGE-L", "accuracy": "accuracy", "pearson": "Pearson"}


def fill(text: str, results: Path) -> str:
    """The text with every block ``<!-- results:NAME --> ... <!-- end -->`` written anew."""
    blocks: dict[str, Callable[[Path], str]] = {"quickstart": _quickstart, "table": _table, "choices": _choices}
    for name, make in blocks.items():
        pattern = re.compile(rf"(<!-- results:{name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if pattern.search(text):
            body = make(results)
            text = pattern.sub(lambda match, body=body: f"{match[1]}{body}{match[2]}", text)  # type: ignore[misc]
    return text


def _quickstart(results: Path) -> str:
    record = json.loads((results / "quickstart.json").read_text())
    rows = [
        ["validation loss (nats)", *(f"{record[side]['loss']:.3f}" for side in ("dense", "sparse"))],
        ["perplexity", *(f"{record[side]['perplexity']:.1f}" for side in ("dense", "sparse"))],
        ["FFN sparsity", *(f"{record[side]['sparsity']:.1%}" for side in ("dense", "sparse"))],
        ["GFLOPs per token (2^30)", *(f"{record[side]['gflops_per_token']:.4f}" for side in ("dense", "sparse"))],
        ["decode tokens/s", *(f"{record[side]['tokens_per_s']:.0f}" for side in ("dense", "sparse"))],
    ]
    table = _markdown(["`make quickstart`, same data and steps", "dense", "sparse"], rows)
    return f"{table}\nTook {record['seconds']:.0f} s on 2 CPU cores; read from `results/quickstart.json`.\n"


def _table(results: Path) -> str:
    parts = []
    for folder, title in TITLES.items():
        records = _read(results / folder)
        if not records:
            continue
        metric = METRICS[next(iter(records.values()))["metric"]]
        rows = [_row(name, record) for name, record in sorted(records.items(), key=lambda item: item[1]["sparsity"])]
        parts.append(
            f"**{title}**\n\n" + _markdown(["run", "FFN sparsity", metric, "loss (nats)", "GFLOPs/token"], rows)
        )
    note = (
        "Each row is `results/<task>/<run>.json`, which names the command that made it; the run itself is "
        "`recipes/<task>/<run>.yaml`.\n"
    )
    return "\n".join([*parts, note])


def _choices(results: Path) -> str:
    dense = json.loads((results / "quickstart.json").read_text())["dense"]["loss"]
    rows = [
        [
            name,
            f"{record['sparsity']:.1%}",
            " ".join(f"{share:.0%}" for share in record["sparsity_per_layer"]),
            f"{record['extras']['cross_entropy']:.3f}",
            f"{record['extras']['cross_entropy'] - dense:+.3f}",
        ]
        for name, record in _read(results / "choices").items()
    ]
    return _markdown(["run", "FFN sparsity", "per layer", "validation loss", "against dense"], rows)


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def _row(name: str, record: dict[str, Any]) -> list[str]:
    loss = record["extras"].get("cross_entropy", record["extras"].get("loss"))
    return [
        name,
        f"{record['sparsity']:.1%}",
        f"{record['value']:.4f}",
        "-" if loss is None else f"{loss:.3f}",
        f"{record['gflops_per_token']['sparse']:.4f}",
    ]


def _markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def main(root: Path) -> None:
    """Rewrite ``root/README.md`` and the pages in ``root/docs``."""
    for page in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        page.write_text(fill(page.read_text(), root / "results"))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path.cwd())
