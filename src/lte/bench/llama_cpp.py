"""What a CPU user would run instead: llama.cpp, on a random-weight model file of the same shape."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lte.bench.gguf_file import write_llama
from lte.bench.shapes import meta_model
from lte.errors import LTEError

FORMATS = {8: ("Q8_0",), 4: ("Q4_0", "Q4_K_M")}
"""Bits of a weight -> the formats of llama.cpp beside it."""

PACKAGES = {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}


def missing() -> str:
    """Which package is not there; empty where llama.cpp can run."""
    names = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    return f"not installed: pip install {' '.join(names)}" if names else ""


def obstacle(config: Any, dtype: str, dense_bytes: float) -> str:
    """Why a model of some shape cannot be timed in llama.cpp beside another copy of it; empty where it can."""
    if reason := missing():
        return reason
    if config.model_type not in ("llama", "mistral") or dtype == "fp16":
        return f"no file is written for {config.model_type} in {dtype}"
    if _available_bytes() < 1.3 * dense_bytes:
        return "too little memory for another copy of the weights"
    whole = 2 * sum(p.numel() for p in meta_model(config).parameters())
    if shutil.disk_usage(tempfile.gettempdir()).free < 2 * whole:
        return f"too little space in {tempfile.gettempdir()} for its files"
    return ""


def _available_bytes() -> int:
    if not hasattr(os, "sysconf") or "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return 1 << 62
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def description() -> str:
    """Names and versions."""
    found = []
    for package in PACKAGES.values():
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} ?")
    return ", ".join(found)


@contextmanager
def model_file(config: Any, dtype: torch.dtype, model: nn.Module | None = None) -> Iterator[Path]:
    """A model of a Llama shape as a file, while the context lasts.

    Args:
        config: a transformers config of the Llama shape.
        dtype: float32 or bfloat16.
        model: whose weights it gets, of this config; random ones if None.
    """
    with tempfile.TemporaryDirectory(prefix="lte-gguf-") as folder:
        path = Path(folder) / "model.gguf"
        write_llama(path, config, dtype, model)
        yield path


class LlamaCpp:
    """A model in llama.cpp, with torch's number of threads; a context manager that removes the file it makes.

    Args:
        file: of :func:`model_file`.
        config: of its model.
        context: tokens the cache holds.
        kind: a format of llama.cpp that the weights are quantised to, for instance ``Q4_K_M``; none if empty.
        all_logits: whether :meth:`logits` will be asked for.
    """

    def __init__(self, file: Path, config: Any, context: int, kind: str = "", *, all_logits: bool = False) -> None:
        self._file, self._config, self._context, self._kind, self._all = file, config, context, kind, all_logits
        self.bytes_per_token = 0
        """Size of the file, less the embeddings, which are not read but for a row."""

    def __enter__(self) -> LlamaCpp:
        from llama_cpp import Llama

        self._folder = tempfile.TemporaryDirectory(prefix="lte-gguf-")
        path = self._file
        if self._kind:
            path = Path(self._folder.name) / "quantised.gguf"
            quantise(self._file, path, self._kind)
            table = self._config.vocab_size * self._config.hidden_size  # and as much for the head, tied or not
            rest = sum(p.numel() for p in meta_model(self._config).model.parameters()) - table
            self.bytes_per_token = round(path.stat().st_size * (table + rest) / (2 * table + rest))
        threads = torch.get_num_threads()
        self._model = Llama(
            str(path),
            n_ctx=self._context,
            n_threads=threads,
            n_threads_batch=threads,
            logits_all=self._all,
            verbose=False,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._model.close()
        self._folder.cleanup()

    def seconds_per_token(self, prompt_length: int, new_tokens: int) -> float:
        """Median time of one decode step after a prompt."""
        self._model.reset()
        self._model.eval([1 + i % 1000 for i in range(prompt_length)])
        times = []
        for i in range(new_tokens):
            started = time.perf_counter()
            self._model.eval([1 + i])
            times.append(time.perf_counter() - started)
        return median(times)

    def prompt_seconds(self, ids: list[int]) -> float:
        """Time of a prompt."""
        self._model.reset()
        started = time.perf_counter()
        self._model.eval(ids)
        return time.perf_counter() - started

    def logits(self, ids_S: Tensor) -> Tensor:
        """[S, V] float32, of a text from its beginning; for a file made of a model."""
        self._model.reset()
        self._model.eval(ids_S.tolist())
        return torch.from_numpy(np.array(self._model.scores[: len(ids_S)], dtype=np.float32))


def quantise(whole: Path, path: Path, kind: str) -> None:
    """Write a model file in another format of llama.cpp's."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    settings.nthread = torch.get_num_threads()
    failed = llama_cpp.llama_model_quantize(str(whole).encode(), str(path).encode(), settings)
    if failed:
        raise LTEError(f"llama.cpp could not write {kind}: error {failed}")
