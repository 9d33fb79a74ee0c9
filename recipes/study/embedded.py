"""Data for the study in small, from the Python standard library: text, and sentences with a label each.

python recipes/study/embedded.py FOLDER
"""

import json
import random
import re
import sys
from pathlib import Path

from lte.quickstart import write_corpus

folder = Path(sys.argv[1])
if not (folder / "sentences.jsonl").is_file():
    whole = {path.name: path for path in write_corpus(folder / "whole", seed=0).values()}
    (folder / "train.txt").write_text(whole["train.txt"].read_text()[:400_000])
    (folder / "validation.txt").write_text(whole["validation.txt"].read_text()[:12_000])
    (folder / "some.txt").write_text(whole["train.txt"].read_text()[:60_000])
    (folder / "short.txt").write_text(whole["validation.txt"].read_text()[:3_000])
    sentences = re.findall(r"[A-Z][a-z]+(?: [a-z]+){4,12}\.", whole["train.txt"].read_text())
    rows = [{"sentence": text, "label": int(bool(re.search(r"\b(the|a|an)\b", text)))} for text in sentences]
    random.Random(0).shuffle(rows)
    (folder / "sentences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:600]))
