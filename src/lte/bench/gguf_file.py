"""A model of the Llama shape as a GGUF file for llama.cpp, with its own weights or random ones, and no tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lte.errors import LTEError

Numbers = np.ndarray[Any, Any]

BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""llama.cpp's names of a block's tensors, and transformers'."""


def write_llama(path: Path, config: Any, dtype: torch.dtype, model: nn.Module | None = None) -> None:
    """Write a model file.

    Args:
        path: of the new file.
        config: a transformers config of the Llama shape.
        dtype: float32 or bfloat16, of the matrices.
        model: a dense one, of this config; None for random weights.

    Raises:
        LTEError: a model llama.cpp's Llama is not: other positions than plain rotary ones, or biases.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise LTEError(f"no file is written for rope_type={rope['rope_type']!r}; only plain rotary positions are")
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_vocab_size(config.vocab_size)
    bf16 = dtype == torch.bfloat16
    writer.add_file_type(LlamaFileType.MOSTLY_BF16 if bf16 else LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("no_vocab")
    kind = GGMLQuantizationType.BF16 if bf16 else GGMLQuantizationType.F32
    numbers = _random(dtype) if model is None else _of_model(model, dtype, heads, kv_heads)

    def matrix(name: str, rows: int, columns: int) -> None:
        writer.add_tensor(f"{name}.weight", numbers(name, (rows, columns)).view(np.uint8), raw_dtype=kind)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", numbers(name, (config.hidden_size,)))

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


def _random(dtype: torch.dtype) -> Callable[[str, tuple[int, ...]], Numbers]:
    pattern = np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32) * 0.02
    if dtype == torch.bfloat16:
        pattern = (pattern.view(np.uint32) >> 16).astype(np.uint16)

    @cache  # the writer holds every tensor until it writes them: those of one shape are one
    def drawn(shape: tuple[int, ...]) -> Numbers:
        return np.ones(shape, np.float32) if len(shape) == 1 else np.resize(pattern, shape)

    return lambda name, shape: drawn(shape)


def _of_model(
    model: nn.Module, dtype: torch.dtype, heads: int, kv_heads: int
) -> Callable[[str, tuple[int, ...]], Numbers]:
    state = model.state_dict()
    embedding = state["model.embed_tokens.weight"]
    named = {
        "token_embd": embedding,
        "output": state.get("lm_head.weight", embedding),
        "output_norm": state["model.norm.weight"],
    }
    biases = [name for name in state if name.endswith("bias")]
    if biases:
        raise LTEError(f"no file is written for a model with biases ({biases[0]})")

    def numbers(name: str, shape: tuple[int, ...]) -> Numbers:
        _, _, part = name.rpartition(".")
        if name.startswith("blk."):
            tensor = state[f"model.layers.{name.split('.')[1]}.{BLOCK[part]}.weight"]
        else:
            tensor = named[name]
        if tuple(tensor.shape) != shape:
            raise LTEError(f"{name} has shape {list(tensor.shape)}; {list(shape)} was expected")
        if part in ("attn_q", "attn_k"):
            tensor = _interleaved(tensor, heads if part == "attn_q" else kv_heads)
        if len(shape) == 1:
            return tensor.float().numpy()
        tensor = tensor.to(dtype).contiguous()
        return (tensor.view(torch.int16) if dtype == torch.bfloat16 else tensor).numpy()

    return numbers


def _interleaved(weight_ND: Tensor, heads: int) -> Tensor:
    """Rows in llama.cpp's order: it turns neighbouring pairs, transformers the two halves of a head."""
    return weight_ND.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
