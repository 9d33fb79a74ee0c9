"""The formats of real data sets; skipped where they are not on this machine."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lte.tasks import TaskConfig, build_task
from lte.tasks.collate import IGNORED
from tests.tasks.tiny import byte_tokenizer

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data beside the repository")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DATA / "models" / "stories-3m")


def test_tinystories(tokenizer):
    task = build_task(TaskConfig(name="lm", context_length=256, limit=20))
    blocks = task.prepare(DATA / "text" / "tinystories" / "train.txt", tokenizer)
    text = tokenizer.decode(blocks[0]["input_ids"])
    assert text.startswith("<s> Once upon a time there was a little boy named Ben.")
    assert text.count("</s><s>") >= 1
    assert "endoftext" not in text


def test_e2e(tokenizer):
    config = TaskConfig(
        name="lm",
        prompt_column="meaning_representation",
        target_column="human_reference",
        split="train",
        limit=5,
    )
    row = build_task(config).prepare(DATA / "e2e", tokenizer)[0]
    learned = tokenizer.decode([label for label in row["labels"] if label != IGNORED])
    assert tokenizer.decode(row["input_ids"]).startswith("<s> name[The Vaults]")
    assert learned.startswith("The Vaults pub near")
    assert learned.endswith("</s>")


def test_sst2():
    task = build_task(TaskConfig(name="classify", split="train", limit=50))
    tokenizer = byte_tokenizer(classify=True)
    assert task.model_kwargs(DATA / "glue" / "sst2", tokenizer)["num_labels"] == 2
    row = task.prepare(DATA / "glue" / "sst2", tokenizer)[0]
    assert tokenizer.decode(row["input_ids"]) == "[CLS]hide new secretions from the parental units[SEP]"
    assert row["labels"] == 0
