"""Mixed text for continued pre-training: web pages, encyclopedia, code, stories, instructions; rows in random order.

python recipes/study/mixed.py DATA > mixed.jsonl
"""

import json
import random
import sys
from pathlib import Path

data = Path(sys.argv[1])
texts = []
for file in sorted((data / "text" / "web").glob("*.jsonl")):
    texts += [json.loads(line)["text"][:4000] for line in file.read_text().splitlines()]
for file in ("text/tinystories/train.txt", "text/wikitext2/train_part.txt"):
    words = (data / file).read_text()[:1_000_000]
    texts += [words[start : start + 4000] for start in range(0, len(words), 4000)]
for line in (data / "instruct" / "train.jsonl").read_text().splitlines()[:1500]:
    row = json.loads(line)
    texts.append("\n".join(filter(None, (row["instruction"], row["input"], row["output"]))))
random.Random(0).shuffle(texts)
for text in texts:
    print(json.dumps({"text": text}))
