"""Fill the marked blocks of README.md and docs/ from results/: ``python -m lte.report.readme``."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lte.report.comparison import FEWEST, fewest_table, points_table
from lte.report.figures import front_figure, scores_figure, settings_figure, tradeoff_figure
from lte.report.studies import Row, bytes_read, interpolated, markdown_table, read_rows

TITLES = {
    "stories": "A 3.1 M-parameter LLaMA trained to saturation, TinyStories",
    "e2e": "A 3.3 M-parameter LLaMA trained from scratch, E2E NLG",
    "sst2": "MiniLM (BERT, 22 M parameters), SST-2",
    "gpt2": "A 2.3 M-parameter GPT-2 (GELU) trained from scratch, TinyStories",
    "opt": "A 2.3 M-parameter OPT (ReLU) trained from scratch, TinyStories",
}
"""Folder of results -> what its rows are about."""


def fill(text: str, results: Path) -> str:
    """The text with every block ``<!-- results:NAME --> ... <!-- end -->`` written anew."""
    blocks: dict[str, Callable[[Path], str]] = {
        "quickstart": _quickstart,
        "compare": _compare,
        "pretrained": _pretrained,
        "reached": _reached,
        "choices": _choices,
        "ffn": _ffn,
        "decode": _decode,
        "limit": _limit,
        "prefill": _prefill,
        "step": _step,
        "gpu": _gpu,
        "front": _front,
        "glue": _glue,
    }
    for name, make in blocks.items():
        pattern = re.compile(rf"(<!-- results:{name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if pattern.search(text):
            body = make(results)
            text = pattern.sub(lambda match, body=body: f"{match[1]}{body}{match[2]}", text)  # type: ignore[misc]
    for name, named in {"ablation": _ablation, "study": _study, "front": _front_named, "decode": _decode_named}.items():
        pattern = re.compile(rf"(<!-- results:{name} ([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
        text = pattern.sub(lambda match, named=named: f"{match[1]}{named(results, match[2])}{match[3]}", text)  # type: ignore[misc]
    return text


def _study(results: Path, name: str) -> str:
    """The tables of a part of the study of recipes/study."""
    rows = read_rows(results / "study" / name)
    table, less = markdown_table(*points_table(rows)), fewest_table(rows)
    return table + (f"\n{FEWEST}\n\n{markdown_table(*less)}" if less[1] else "")


GLUE_SPARSITY = 0.8
"""At which all its tasks were run."""


def _glue(results: Path) -> str:
    """Methods by GLUE's tasks: the metric of each at one sparsity."""
    folders = sorted((results / "study").glob("glue-*"))
    head, found = ["method"], dict[str, list[str]]()
    means: dict[str, list[float]] = {}
    for number, folder in enumerate(folders):
        rows = [row for row in read_rows(folder) if row.target in (None, GLUE_SPARSITY)]
        head.append(f"{folder.name.removeprefix('glue-')} ({rows[0].metric})")
        for row in rows:
            cells = found.setdefault(row.series, ["-"] * len(folders))
            own = row.target is None and row.sparsity.mean > 0
            cells[number] = row.value.text(".3f") + (f" ({row.sparsity.mean:.0f} %)" if own else "")
            means.setdefault(row.series, []).append(row.value.mean)
    order = sorted(found, key=lambda name: (name != "dense", -sum(means[name]) / len(means[name])))
    return markdown_table(head, ([name, *found[name]] for name in order))


def _quickstart(results: Path) -> str:
    record = json.loads((results / "quickstart.json").read_text())
    rows = [
        ["validation loss (nats)", *(f"{record[side]['loss']:.3f}" for side in ("dense", "sparse"))],
        ["perplexity", *(f"{record[side]['perplexity']:.1f}" for side in ("dense", "sparse"))],
        ["FFN sparsity", *(f"{record[side]['sparsity']:.1%}" for side in ("dense", "sparse"))],
        ["MB read per token", *(f"{record[side]['bytes_per_token'] / 1e6:.2f}" for side in ("dense", "sparse"))],
        ["decode tokens/s", *(f"{record[side]['tokens_per_s']:.0f}" for side in ("dense", "sparse"))],
    ]
    table = markdown_table(["`make quickstart`, same data and steps", "dense", "sparse"], rows)
    return f"{table}\nTook {record['seconds']:.0f} s on 2 CPU cores; read from `results/quickstart.json`.\n"


def _compared(results: Path) -> Iterable[tuple[str, str, list[Row]]]:
    for folder, title in TITLES.items():
        if found := read_rows(results / "compare" / folder):
            yield folder, title, found


def _compare(results: Path) -> str:
    parts = [
        f"**{title}** (`lte sweep recipes/compare/{folder}.yaml`)\n\n{_rows_table(found)}\n"
        f"![{title}](figures/compare-{folder}.png)\n"
        for folder, title, found in _compared(results)
    ]
    note = (
        "Each row is the mean of its runs (one seed each) and their standard deviation; a run is one file in "
        "`results/compare/`.\n"
    )
    return "\n".join([*parts, note])


def _reached(results: Path) -> str:
    parts = []
    for _, title, found in _compared(results):
        dense = next(row for row in found if row.series == "dense")
        paper = [row for row in found if row.series == "paper"]
        names = list(dense.qualities)
        columns = [part for name in names for part in ((name, "published") if paper else (name,))]
        table = []
        shown = {"self-prediction": "neurons", "single-stage": "experts of 32"}
        for row in [dense, *(row for series in shown for row in found if row.series == series)]:
            asked = "dense, as many steps"
            if row is not dense:
                asked = f"{shown[row.series]}, `--target-sparsity` {100 * float(row.setting.rpartition(' ')[2]):g} %"
            cells = [asked, str(row.seeds), row.sparsity.text(".1f")]
            for name in names:
                cells.append(row.qualities[name].text())
                if paper:
                    cells.append(_number(interpolated(paper, row.sparsity.mean, name), ".3f"))
            table.append(cells)
        parts.append(markdown_table([title, "seeds", "FFN sparsity %", *columns], table))
    return "\n".join(parts)


ROUTERS_OF_EXPERTS = 0.01
"""Share of an FFN's bytes that linear routers on experts of 32 read; their records are older than that count."""


def _pretrained(results: Path) -> str:
    """Sparse models of a pretrained one, beside the dense model that saw as much."""
    found = _read(results / "smollm2")
    copies = _read(results / "ablations" / "predictors")
    untrained = [record for _, record in sorted(copies.items()) if record["series"] == "copy of 3 bits"]
    untouched, tuned = found["dense"]["untouched"]["value"], found["dense"]["value"]
    rows: list[list[str]] = []
    for records, about, dense, base in (
        (untrained, "neurons, no training", "dense", untouched),
        (_called(found, "trained-"), "neurons, trained", "dense, fine-tuned as long", tuned),
        (_called(found, "s"), "experts of 32, learned routers, trained", "dense, fine-tuned as long", tuned),
    ):
        first = [dense, "0%", "100%", f"{base:.2f}", "-"]
        rows += [first] if first not in rows else []
        for record in records:
            read = bytes_read(record) or 1 - record["sparsity"] + ROUTERS_OF_EXPERTS
            loss = math.log(record["value"] / base)
            rows.append([about, f"{record['sparsity']:.1%}", f"{read:.0%}", f"{record['value']:.2f}", f"{loss:+.3f}"])
    return markdown_table(["SmolLM2-135M", "FFN sparsity", "FFN bytes read", "perplexity", "nats above dense"], rows)


def _called(found: dict[str, dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Records whose names are a word and a number, by the number."""
    return [found[name] for name in sorted(found) if re.fullmatch(rf"{kind}\d+", name)]


def _rows_table(found: list[Row], *, layers: bool = False) -> str:
    read = layers and any(row.read is not None for row in found)
    head = ["training", "setting", "seeds", "FFN sparsity %", *(["FFN bytes %"] if read else [])]
    head += [found[0].metric, "loss (nats)"]
    table = [
        [
            row.series,
            row.setting or "-",
            str(row.seeds),
            row.sparsity.text(".1f"),
            *([_number(row.read, ".0f")] if read else []),
            row.value.text(".3f"),
            row.loss.text(".3f"),
            *([" ".join(f"{layer:.0f}" for layer in row.layers)] if layers else []),
        ]
        for row in found
    ]
    return markdown_table([*head, "per layer %"] if layers else head, table)


def _by_loss(folder: Path) -> list[Row]:
    return sorted(read_rows(folder), key=lambda row: row.loss.mean)


def _ablation(results: Path, name: str) -> str:
    found = _by_loss(results / "ablations" / name)
    if not found:
        return f"Not run yet: `lte sweep recipes/ablations/{name}.yaml`.\n"
    return f"{_rows_table(found, layers=True)}\n![{name}](figures/ablation-{name}.png)\n"


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
    return markdown_table(["run", "FFN sparsity", "per layer", "validation loss", "against dense"], rows)


def _ffn(results: Path) -> str:
    parts = []
    for record in _read(results / "speed").values():
        if "bench ffn" not in record["command"]:
            continue
        first = record["rows"][0]
        rows = [
            [
                str(row["tokens"]),
                f"{row['sparsity']:.0%}",
                *(_number(row.get(key), form) for key, form in _SPEED_COLUMNS.items()),
            ]
            for row in record["rows"]
        ]
        head = ["tokens", "sparsity", "dense ms", "sparse ms", "speed-up", "GB/s", "limit GB/s"]
        grain = "single neurons" if first["expert_size"] == 1 else f"experts of {first['expert_size']}"
        about = f"{first['d_model']} x {first['d_ff']}, {first['dtype']}, {grain}, {first.get('router', 'linear')}"
        title = f"**{about}** against {first['baseline']}"
        parts.append(f"{title}\n\n{markdown_table(head, rows)}")
    return "\n".join(parts) + _where(results)


_SPEED_COLUMNS = {
    "dense_ms": ".2f",
    "sparse_ms": ".2f",
    "speedup": ".2f",
    "gbytes_per_s": ".1f",
    "limit_gbytes_per_s": ".1f",
}


def _decode(results: Path) -> str:
    """Every run of ``lte bench decode``."""
    records = {name: record for name, record in _read(results / "speed").items() if "bench decode" in record["command"]}
    return "\n".join(f"**{name}**\n\n{_decode_table(record)}" for name, record in records.items()) + _where(results)


def _decode_named(results: Path, name: str) -> str:
    return _decode_table(_read(results / "speed")[name])


def _decode_table(record: Mapping[str, Any]) -> str:
    rows = [
        [
            f"{row['engine']} ({row['version']})",
            row.get("weights", row["dtype"]),
            f"{row['sparsity']:.0%}",
            _number(row.get("ms_per_token"), ".1f"),
            _number(row.get("speedup"), ".2f"),
            _number(row.get("speedup_over_llama_cpp"), ".2f"),
            _number(row.get("limit_speedup"), ".2f"),
        ]
        for row in record["rows"]
    ]
    compared = ["vs transformers", "vs llama.cpp", "bytes allow, vs dense"]
    return markdown_table(["engine", "weights", "FFN sparsity", "ms/token", *compared], rows)


def _prefill(results: Path) -> str:
    """Milliseconds of prompts, a line for every length, a column for every engine and sparsity."""
    parts = []
    for name, record in _read(results / "speed").items():
        if "bench prefill" not in record["command"]:
            continue
        lines: dict[int, list[dict[str, Any]]] = {}
        for row in record["rows"]:
            lines.setdefault(row["tokens"], []).append(row)
        first = next(iter(lines.values()))
        head = ["tokens", *(row["engine"] + (f" {row['asked']:.0%}" if "asked" in row else "") for row in first)]
        body = [
            [
                str(tokens),
                *(f"{row['ms']:.1f} ({row['speedup']:.2f})" if "ms" in row else row["status"][:20] for row in rows),
            ]
            for tokens, rows in lines.items()
        ]
        parts.append(f"**{name}**, ms (stock transformers over it)\n\n" + markdown_table(head, body))
    return "\n".join(parts) + _where(results)


def _front(results: Path) -> str:
    parts = []
    for name, record in _fronts(results).items():
        left = [
            f"{row['weights']} ({row['status'].removeprefix('left out: ')})"
            for row in record["rows"]
            if "loss" not in row
        ]
        said = f"\nLeft out: {', '.join(left)}.\n" if left else ""
        parts.append(f"**{name}**\n\n{_front_table(record)}{said}\n![{name}](figures/{name}.png)\n")
    return "\n".join(parts)


def _front_named(results: Path, name: str) -> str:
    return _front_table(_fronts(results)[name])


def _front_table(record: Mapping[str, Any]) -> str:
    rows = [
        [
            f"{row['engine']} {row['weights']}" + (f", {row['steps']} steps" if row["steps"] else ""),
            *(f"{row[key]:.{places}f}" for key, places in (("bits_per_weight", 2), ("mbytes", 1))),
            *(f"{row['above_dense']:+.3f}", f"{row['kl_divergence']:.4f}", f"{row['same_top']:.1%}"),
            f"{row['ms_per_token']:.1f}",
        ]
        for row in sorted(record["rows"], key=lambda row: -row.get("bits_per_weight", 0))
        if row["status"] == "ok"
    ]
    return markdown_table(["weights", "bits", "MB a token", "nats above 16 bits", "KL", "same top", "ms a token"], rows)


def _fronts(results: Path) -> dict[str, dict[str, Any]]:
    return {name: record for name, record in _read(results / "speed").items() if "bench front" in record["command"]}


def _gpu(results: Path) -> str:
    parts = []
    for record in _read(results / "gpu").values():
        rows = [
            [
                *(row["weights"], str(row["tokens"]), f"{row['sparsity']:.0%}", row["backend"]),
                *(f"{row[name] * 1e3:.0f}" for name in ("dense_ms", "sparse_ms")),
                *(f"{row['speedup']:.2f}", f"{row['gbytes_per_s']:.0f}"),
            ]
            for row in record["ffn"]
        ]
        head = ["weights", "tokens", "sparsity", "path", "cuBLAS bf16, us", "lte, us", "speed-up", "GB/s read"]
        passed = sum(row["status"] == "ok" for row in record["correctness"])
        parts.append(
            f"{markdown_table(head, rows)}\nMeasured on an {record['gpu']}, torch {record['versions']['torch']}, a "
            f"copy moving {record['copy_gbytes_per_s']:.0f} GB/s; {passed} of {len(record['correctness'])} cases agree "
            f"with the float32 reference. `{record['command']}`.\n"
        )
    return "\n".join(parts)


def _where(results: Path) -> str:
    record = next(iter(_read(results / "speed").values()))
    machine = record["machine"]
    return (
        f"\nMeasured on {machine['processor']}, {machine['torch_threads']} threads ({machine['device']}), "
        f"torch {record['versions']['torch']}; read from `results/speed/`, where each file names its command.\n"
    )


def _limit(results: Path) -> str:
    rows: dict[str, list[str]] = {}
    record = json.loads((results / "speed" / "limit.json").read_text())
    for row in record["rows"]:
        name = row["config"]
        rows.setdefault(name, [name, f"{row['gbytes_per_token']:.2f}", f"{row['ffn_share']:.0%}"])
        rows[name].append(f"{row['limit_speedup']:.2f}")
    sparsities = [f"{row['sparsity']:.0%}" for row in record["rows"] if row["config"] == record["rows"][0]["config"]]
    return markdown_table(["model", "GB per token (bf16)", "FFN share", *sparsities], rows.values())


def _step(results: Path) -> str:
    records = [record for record in _read(results / "speed").values() if "bench step" in record["command"]]
    rows = [
        [
            f"`{row['model']}`",
            row["training"],
            f"{row['batch']} x {row['context']}",
            f"{row['ms_per_step']:.0f}",
            f"{row['time_ratio']:.3f}",
            f"{row['mbytes']:.0f}",
            f"{row['memory_ratio']:.3f}",
        ]
        for record in records
        for row in record["rows"]
    ]
    return markdown_table(["model", "training", "tokens", "ms/step", "time ratio", "MB", "memory ratio"], rows)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def main(root: Path) -> None:
    """Rewrite ``root/README.md``, the pages in ``root/docs``, and the figures beside them."""
    for page in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        page.write_text(fill(page.read_text(), root / "results"))
    figures = root / "docs" / "figures"
    figures.mkdir(exist_ok=True)
    for folder in sorted((root / "results" / "compare").glob("*/")):
        if found := read_rows(folder):
            tradeoff_figure(found, TITLES[folder.name], figures / f"compare-{folder.name}.png")
    for folder in sorted((root / "results" / "ablations").glob("*/")):
        if found := _by_loss(folder):
            settings_figure(found, folder.name, figures / f"ablation-{folder.name}.png")
    for name, record in _fronts(root / "results").items():
        front_figure(record["rows"], name, figures / f"{name}.png")
    routers = root / "results" / "ablations" / "router"
    records = [json.loads(path.read_text()) for path in sorted(routers.glob("*seed=0.json"))]
    shown = ("linear, fitted start", "softmax top-k")
    if histograms := {r["series"]: r["score_histogram"] for r in records if r["series"] in shown}:
        scores_figure(histograms, figures / "scores.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path.cwd())
