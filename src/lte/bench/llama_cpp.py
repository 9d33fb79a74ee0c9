"""What a CPU user would run instead: llama.cpp, on a random-weight model file of the same shape."""

from __future__ import annotations

import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

import numpy as np
import torch

from lte.bench.shapes import meta_model
from lte.errors import LTEError

FORMATS = {8: ("Q8_0",), 4: ("Q4_0", "Q4_K_M")}
"""Bits of a weight -> the formats of llama.cpp beside it."""

PACKAGES = {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}


def missing() -> str:
    """Which package is not there; empty where llama.cpp can run."""
    names = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    return f"not installed: pip install {' '.join(names)}" if names else ""


def description() -> str:
    """Names and versions."""
    found = []
    for package in PACKAGES.values():
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} ?")
    return ", ".join(found)


class LlamaCpp:
    """A model of a Llama shape in llama.cpp, with torch's number of threads; a context manager that removes its file.

    Args:
        config: a transformers config of the Llama shape.
        dtype: float32 or bfloat16.
        context: tokens the cache holds.
        kind: a format of llama.cpp that the weights are quantised to, for instance ``Q4_K_M``; none if empty.
    """

    def __init__(self, config: Any, dtype: torch.dtype, context: int, kind: str = "") -> None:
        self._config, self._dtype, self._context, self._kind = config, dtype, context, kind
        self.bytes_per_token = 0
        """Size of the file, less the embeddings, which are not read but for a row."""

    def __enter__(self) -> LlamaCpp:
        from llama_cpp import Llama

        self._folder = tempfile.TemporaryDirectory(prefix="lte-gguf-")
        path = Path(self._folder.name) / "model.gguf"
        _write(path, self._config, self._dtype)
        if self._kind:
            whole, path = path, path.with_name("quantised.gguf")
            quantise(whole, path, self._kind)
            whole.unlink()
            table = self._config.vocab_size * self._config.hidden_size  # and as much for the head, tied or not
            rest = sum(p.numel() for p in meta_model(self._config).model.parameters()) - table
            self.bytes_per_token = round(path.stat().st_size * (table + rest) / (2 * table + rest))
        threads = torch.get_num_threads()
        self._model = Llama(str(path), n_ctx=self._context, n_threads=threads, n_threads_batch=threads, verbose=False)
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


def quantise(whole: Path, path: Path, kind: str) -> None:
    """Write a model file in another format of llama.cpp's."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    settings.nthread = torch.get_num_threads()
    failed = llama_cpp.llama_model_quantize(str(whole).encode(), str(path).encode(), settings)
    if failed:
        raise LTEError(f"llama.cpp could not write {kind}: error {failed}")


def _write(path: Path, config: Any, dtype: torch.dtype) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config.vocab_size)
    bf16 = dtype == torch.bfloat16
    writer.add_file_type(LlamaFileType.MOSTLY_BF16 if bf16 else LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("no_vocab")
    pattern = np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32) * 0.02
    if bf16:
        pattern = (pattern.view(np.uint32) >> 16).astype(np.uint16)
    kind = GGMLQuantizationType.BF16 if bf16 else GGMLQuantizationType.F32

    def matrix(name: str, rows: int, columns: int) -> None:
        values = np.resize(pattern, rows * columns).reshape(rows, columns)
        writer.add_tensor(f"{name}.weight", values.view(np.uint8), raw_dtype=kind)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(config.hidden_size, np.float32))

    matrix("token_embd", config.vocab_size, config.hidden_size)
    matrix("output", config.vocab_size, config.hidden_size)
    norm("output_norm")
    for layer in range(config.num_hidden_layers):
        block = f"blk.{layer}."
        matrix(block + "attn_q", heads * head_dim, config.hidden_size)
        matrix(block + "attn_k", kv_heads * head_dim, config.hidden_size)
        matrix(block + "attn_v", kv_heads * head_dim, config.hidden_size)
        matrix(block + "attn_output", config.hidden_size, heads * head_dim)
        matrix(block + "ffn_gate", config.intermediate_size, config.hidden_size)
        matrix(block + "ffn_up", config.intermediate_size, config.hidden_size)
        matrix(block + "ffn_down", config.hidden_size, config.intermediate_size)
        norm(block + "attn_norm")
        norm(block + "ffn_norm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
