from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch

from tests.tasks.tiny import tiny_llama


@pytest.fixture(autouse=True, scope="session")
def _one_thread_and_own_cache(tmp_path_factory):
    threads, cache = torch.get_num_threads(), datasets.config.HF_DATASETS_CACHE
    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets_cache")
    yield
    torch.set_num_threads(threads)
    datasets.config.HF_DATASETS_CACHE = cache


@pytest.fixture
def llama():
    return tiny_llama()


@pytest.fixture
def write_jsonl(tmp_path):
    def write(rows, name="data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write
