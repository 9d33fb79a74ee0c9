"""Rows of one MMLU subject, from files that hold all subjects."""

from functools import cache

from datasets import Dataset, load_dataset


@cache
def _all_rows(file: str) -> Dataset:
    return load_dataset("json", data_files=file, split="train")


def of_subject(subject: str, **splits: str) -> dict[str, Dataset]:
    """Split -> rows whose ``subject`` is the one asked for.

    Args:
        subject: from a task's ``metadata``.
        **splits: name of a split -> file, from its ``dataset_kwargs``; whatever else the harness hands over is no file.
    """
    found = {}
    for split in ("test", "dev"):
        rows = _all_rows(splits[split])
        found[split] = rows.select([index for index, name in enumerate(rows["subject"]) if name == subject])
        if not len(found[split]):
            raise ValueError(f"{splits[split]} has no row with subject={subject!r}")
    return found
