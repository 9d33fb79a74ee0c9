"""Shapes of well-known models, and models of these shapes with random weights: speed depends on nothing else."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lte.config import MethodConfig, SparsityConfig, WeightsConfig
from lte.errors import ConfigError
from lte.gguf import split_path
from lte.hub import read_config
from lte.inference.packing import streaming_copy
from lte.memory import trim_heap
from lte.nn import NestedDown, NestedLinear, QuantizedWeight, Router, ScoreRouter, SparseFFN, sparse_ffns
from lte.quantization import install_quantized
from lte.sparsify import install_sparse_ffns
from lte.thresholds import shifted

Shape = dict[str, Any]


def _llama(d_model: int, d_ff: int, layers: int, heads: int, kv_heads: int | None = None, vocab: int = 32000) -> Shape:
    return {
        "model_type": "llama",
        "hidden_size": d_model,
        "intermediate_size": d_ff,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
    }


SHAPES: dict[str, Shape] = {
    "llama-1.2b": _llama(2048, 5632, 22, 32),
    "llama-2-7b": _llama(4096, 11008, 32, 32),
    "llama-2-13b": _llama(5120, 13824, 40, 40),
    "llama-2-70b": _llama(8192, 28672, 80, 64, 8),
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128256),
    "mistral-7b": {**_llama(4096, 14336, 32, 32, 8), "model_type": "mistral"},
    "qwen2.5-0.5b": {
        **_llama(896, 4864, 24, 14, 2, 151936),
        "model_type": "qwen2",
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {**_llama(3584, 18944, 28, 28, 4, 152064), "model_type": "qwen2"},
    "qwen3-8b": {**_llama(4096, 12288, 36, 32, 8, 151936), "model_type": "qwen3", "head_dim": 128},
    "gpt2": {"model_type": "gpt2"},
    "gpt2-xl": {"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25},
    "opt-6.7b": {
        "model_type": "opt",
        "hidden_size": 4096,
        "ffn_dim": 16384,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "word_embed_proj_dim": 4096,
    },
}
"""Name -> transformers config, after each model's published ``config.json``. ``llama-1.2b`` is TinyLlama's shape with
full attention heads."""


def model_config(name: str | None, folder: str | None = None) -> Any:
    """The transformers config of a shape of :data:`SHAPES`, of a JSON or .gguf file, or of a model folder or hub id."""
    if folder is not None:
        return read_config(folder)
    if name in SHAPES:
        values = dict(SHAPES[str(name)])
        return AutoConfig.for_model(values.pop("model_type"), **values)
    if name is not None and split_path(name):
        return read_config(name)
    if name is not None and Path(name).is_file():
        try:
            return AutoConfig.from_pretrained(name)
        except (ValueError, TypeError, OSError, RecursionError, StrictDataclassError) as error:
            raise ConfigError(f"{name} is no model config: {' '.join(str(error).split())}") from error
    raise ConfigError(f"shape {name!r} is unknown; choose one of {', '.join(SHAPES)}, or give --model DIR")


def meta_model(config: Any) -> Any:
    """A causal language model without storage, for counting."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def random_model(
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    method: MethodConfig,
    *,
    weights: WeightsConfig | None = None,
    seed: int = 0,
) -> Any:
    """A model of a shape, sparse by some method, in hard mode, its weights drawn at random and never held twice.

    Args:
        config: of transformers.
        dtype, device: of the model.
        method: what makes it sparse.
        weights: of few bits, drawn as codes; None for numbers of ``dtype``.
        seed: of what is drawn.
    """
    model = meta_model(config)
    model.config.dtype = dtype
    install_sparse_ffns(model, method)
    if weights is not None:
        install_quantized(model, weights)
    model = model.to(dtype)
    buffers = dict(AutoModelForCausalLM.from_config(_one_layer(config)).named_buffers())
    generator = torch.Generator(device=device).manual_seed(seed)
    pattern = torch.randn(1 << 20, generator=generator, device=device).to(dtype)
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            plain = "norm" in f"{module_name}.{name}" or name == "bias" or not parameter.ndim
            scale = 1.0 if plain else parameter.shape[-1] ** -0.5
            value = _tile(pattern, parameter.shape) * scale
            if "norm" in module_name or "ln_" in module_name:
                value = torch.ones_like(value) if name == "weight" else torch.zeros_like(value)
            elif isinstance(module, ScoreRouter | QuantizedWeight):
                value = torch.ones_like(value)
            elif name == "bias":
                value = torch.zeros_like(value)
            copy = streaming_copy(value.to(parameter.dtype))  # routers keep their own
            setattr(module, name, nn.Parameter(copy, requires_grad=False))
    for module in model.modules():
        if isinstance(module, QuantizedWeight):
            draw_codes(module, generator)
            trim_heap(device)  # what was drawn with left holes among what is kept
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_buffer(leaf, buffer.to(device), persistent=False)
    if weights is None:
        model.tie_weights()
    model.config.quantization_config = SparsityConfig(method, version("learn-to-be-efficient"), weights=weights)
    return model.eval()


def draw_codes(module: QuantizedWeight, generator: torch.Generator) -> None:
    """Any byte is as many codes; scales such that outputs are as large as inputs."""
    device = generator.device
    pattern = torch.randint(256, (1 << 20,), generator=generator, device=device, dtype=torch.uint8)
    module.codes = streaming_copy(_tile(pattern, module.codes.shape))
    scale = torch.tensor((12 / module.columns) ** 0.5 / 2**module.bits, dtype=torch.bfloat16, device=device)
    module.scales = streaming_copy(scale.view(torch.int16).expand(module.scales.shape))
    if isinstance(module, NestedLinear | NestedDown):
        module.lower = streaming_copy(_tile(pattern, module.lower.shape))
    if isinstance(module, NestedDown):
        module.exact = torch.arange(len(module.exact), dtype=torch.int32, device=device)
        module.scales[: len(module.exact)] = 0
        module.exact_rows = torch.zeros(module.exact_rows.shape, dtype=torch.int16, device=device)


def _one_layer(config: Any) -> Any:
    """The same config with as little to allocate as can be: only buffers (rotary frequencies) are taken from it."""
    values = config.to_dict()
    for name in ("num_hidden_layers", "n_layer"):
        if name in values:
            values[name] = 1
    values.pop("layer_types", None)
    values["vocab_size"] = 8
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        values[name] = None
    return AutoConfig.for_model(values.pop("model_type"), **values)


def dense_twin(model: Any) -> Any:
    """The stock dense model on the same memory, but for the down projections, which it gets in their stock layout."""
    twin = meta_model(dense_config(model))
    twin = twin.to(model.dtype)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, _ in list(twin.named_parameters(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        weight = parameters[name].data
        if not weight.is_contiguous():
            weight = streaming_copy(weight)
        setattr(twin.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        twin.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
    return twin.eval()


def dense_config(model: Any) -> Any:
    """The transformers config of a sparse model's dense twin."""
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    return config


def bias_for(logits: Tensor, sparsity: float) -> float:
    """The router bias that leaves this share of the logits below a score of one half; between two, so none ties."""
    values = logits.flatten().sort().values
    below = min(len(values) - 1, max(1, round(sparsity * len(values))))
    return -float(values[below - 1] + values[below]) / 2


def move_threshold(router: Router, inputs: Sequence[Tensor], sparsity: float) -> None:
    """Leave out this share of (token, expert) pairs of some inputs, [..., D] each."""
    margins = torch.cat([router(x).margins.flatten() for x in inputs])
    router.threshold = shifted(router.threshold, -bias_for(margins, sparsity))


def _tile(pattern: Tensor, shape: torch.Size) -> Tensor:
    n = shape.numel()
    return pattern.repeat(-(-n // len(pattern)))[:n].view(shape)


def check_sparsities(sparsities: Sequence[float]) -> None:
    """ConfigError where one is none."""
    for sparsity in sparsities:
        if not 0 <= sparsity < 1:
            raise ConfigError(f"sparsity={sparsity} is out of range; it is the share left out, from 0 up to below 1")


@torch.no_grad()
def leave_out(model: Any, sparsity: float, ids_BS: Tensor) -> None:
    """Move every threshold so that this share of its experts is left out on these tokens; 0: none of them."""
    if sparsity <= 0:
        for ffn in sparse_ffns(model):
            ffn.router.threshold = shifted(0.5, -math.inf)
        return
    # Layer by layer from the front: what a router sees depends on those before it.
    with _quantile_hooks(sparse_ffns(model), sparsity):
        model(ids_BS, use_cache=False)


def thresholds_again(model: Any) -> Callable[[], None]:
    """What puts a model's thresholds back where they are now."""
    states = [(ffn.router, ffn.router.get_extra_state()) for ffn in sparse_ffns(model)]

    def put_back() -> None:
        for router, state in states:
            router.set_extra_state(state)

    return put_back


@contextmanager
def _quantile_hooks(ffns: list[SparseFFN], sparsity: float) -> Iterator[None]:
    def before(ffn: SparseFFN, args: tuple[Tensor, ...]) -> None:
        move_threshold(ffn.router, [args[0]], sparsity)

    handles = [ffn.register_forward_pre_hook(before) for ffn in ffns]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
