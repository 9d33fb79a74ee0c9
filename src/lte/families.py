"""Where each transformer family keeps its feed-forward networks: one declarative row per family.

Adding a family is adding a row (or calling :func:`register_family`); nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.activations import ACT2FN

from lte.errors import ConfigError, UnsupportedModelError
from lte.nn import DeferredLinear, Router, SparseFFN, SplitSparseFFN

ACTIVATION_NAMES = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
"""Names transformers uses in configs -> the canonical names of :class:`lte.ops.FFNWeights`."""

RouterFactory = Callable[[int, int, nn.Parameter], Router]
"""``(d_model, d_ff, like)`` -> a router on the device of ``like``."""


@dataclass(frozen=True)
class FFNSpec:
    """Where a family keeps its FFN. Paths are relative to a block, ``blocks`` to the base model.

    Attributes:
        blocks: the list of transformer blocks.
        down: the output projection.
        act: the activation module.
        up: the input projection; for a gated FFN the one without an activation.
        gate: the projection under the activation, for gated FFNs.
        gate_up: gate and up in one projection, gate first, instead of ``gate`` and ``up``.
        dropout: dropout on the FFN's output, where it is part of the FFN module.
        config_act: name of the config field that names the activation.

    Where all parts are children of one module, that module is replaced; otherwise the FFN is computed in place
    of its down projection (see :class:`lte.nn.SplitSparseFFN`).
    """

    blocks: str
    down: str
    act: str
    up: str | None = None
    gate: str | None = None
    gate_up: str | None = None
    dropout: str | None = None
    config_act: str = "hidden_act"

    def parts(self) -> dict[str, str]:
        """Role -> path, for the roles this family has."""
        roles = ("gate", "up", "gate_up", "down", "act", "dropout")
        return {role: path for role in roles if (path := getattr(self, role)) is not None}


@dataclass(frozen=True)
class DecoderSpec:
    """Where a pre-norm decoder with rotary attention keeps its other parts; the fused decode step reads them.

    Attributes:
        qkv: the projections whose outputs, one after the other, are queries, keys and values; paths in a block.
        output: the output projection of the attention.
        attention_norm, ffn_norm: RMS norms before the attention and before the FFN.
        head_norms: norms of each query and key head, where the family has them.
        norm_offset: a norm multiplies by ``norm_offset + weight``.
        final_norm, rotary: paths in the base model.
    """

    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    output: str = "self_attn.o_proj"
    attention_norm: str = "input_layernorm"
    ffn_norm: str = "post_attention_layernorm"
    head_norms: tuple[str, str] | None = None
    norm_offset: float = 0.0
    final_norm: str = "norm"
    rotary: str = "rotary_emb"


_GATED_MLP = FFNSpec(blocks="layers", gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj", act="mlp.act_fn")
_ENCODER = FFNSpec(
    blocks="encoder.layer",
    up="intermediate.dense",
    act="intermediate.intermediate_act_fn",
    down="output.dense",
)

FAMILIES: dict[str, FFNSpec] = {
    "llama": _GATED_MLP,
    "mistral": _GATED_MLP,
    "qwen2": _GATED_MLP,
    "qwen3": _GATED_MLP,
    "gemma": _GATED_MLP,
    "phi3": FFNSpec(blocks="layers", gate_up="mlp.gate_up_proj", down="mlp.down_proj", act="mlp.activation_fn"),
    "opt": FFNSpec(
        blocks="decoder.layers", up="fc1", act="activation_fn", down="fc2", config_act="activation_function"
    ),
    "gpt2": FFNSpec(
        blocks="h",
        up="mlp.c_fc",
        act="mlp.act",
        down="mlp.c_proj",
        dropout="mlp.dropout",
        config_act="activation_function",
    ),
    "gpt_neox": FFNSpec(blocks="layers", up="mlp.dense_h_to_4h", act="mlp.act", down="mlp.dense_4h_to_h"),
    "bert": _ENCODER,
    "roberta": _ENCODER,
}
"""``config.model_type`` -> where that family keeps its FFNs."""


DECODERS: dict[str, DecoderSpec] = {
    "llama": DecoderSpec(),
    "mistral": DecoderSpec(),
    "qwen2": DecoderSpec(),
    "qwen3": DecoderSpec(head_norms=("self_attn.q_norm", "self_attn.k_norm")),
    "gemma": DecoderSpec(norm_offset=1.0),
    "phi3": DecoderSpec(qkv=("self_attn.qkv_proj",)),
}
"""``config.model_type`` -> its decoder, for families whose whole decode step the CPU kernels compute."""


def register_family(model_type: str, spec: FFNSpec) -> None:
    """Teach the package a family, or replace a row: ``register_family("my_model", FFNSpec(...))``."""
    FAMILIES[model_type] = spec


def family_spec(model: nn.Module) -> FFNSpec:
    """The row for a model; UnsupportedModelError names the known families and the way to add one."""
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"model family {model_type!r} is not known; known families: {', '.join(sorted(FAMILIES))}. "
            f"Add one with lte.register_family({model_type!r}, lte.FFNSpec(blocks=..., up=..., act=..., down=...))"
        )
    return FAMILIES[model_type]


def blocks_of(model: Any) -> list[nn.Module]:
    """The transformer blocks of a model, in order."""
    spec = family_spec(model)
    try:
        blocks = model.base_model.get_submodule(spec.blocks)
    except AttributeError:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no blocks at {spec.blocks!r} of its base model, where the row for "
            f"{model.config.model_type!r} says; load it with AutoModelForCausalLM, AutoModelForSequenceClassification "
            "or AutoModel, or register a row for it"
        ) from None
    return list(blocks)


def install_ffns(model: Any, make_router: RouterFactory, layers: Collection[int] | None = None) -> list[SparseFFN]:
    """Put a :class:`SparseFFN` in place of FFNs, in place; parameters are shared, not copied.

    Args:
        model: of a known family.
        make_router: (d_model, d_ff, a weight) -> router.
        layers: indices of the blocks whose FFN it is; None for all.
    """
    spec = family_spec(model)
    count = len(blocks_of(model))
    if wrong := sorted(set(layers or ()) - set(range(count))):
        raise ConfigError(f"layers: there is no block {wrong[0]}; the model has {count}, from 0 to {count - 1}")
    activation = canonical_activation(getattr(model.config, spec.config_act))
    ffns: list[SparseFFN] = []
    for index, block in enumerate(blocks_of(model)):
        if layers is not None and index not in layers:
            continue
        parts = {role: block.get_submodule(path) for role, path in spec.parts().items()}
        parents = {path.rpartition(".")[0] for path in spec.parts().values()}
        down = parts["down"]
        d_ff, d_model = _down_shape(down)
        router = make_router(d_model, d_ff, down.get_parameter("weight"))
        if len(parents) == 1 and parents != {""}:
            names = {role: path.rpartition(".")[2] for role, path in spec.parts().items()}
            ffn = SparseFFN(
                {names[role]: part for role, part in parts.items()},
                names,
                activation=activation,
                router=router,
                layer_index=len(ffns),
            )
            block.set_submodule(parents.pop(), ffn)
        else:
            ffn = _install_split(block, spec, parts, activation, router, len(ffns))
        ffn.train(block.training)
        ffns.append(ffn)
    return ffns


def replace_activation(model: Any, name: str) -> None:
    """Put another activation into all FFNs of a dense model, and into its config."""
    spec = family_spec(model)
    for block in blocks_of(model):
        block.set_submodule(spec.act, ACT2FN[name])
    setattr(model.config, spec.config_act, name)


def canonical_activation(name: Any) -> str:
    """``gelu_new`` -> ``gelu_tanh`` and so on; UnsupportedModelError for what the operator does not have."""
    if name not in ACTIVATION_NAMES:
        raise UnsupportedModelError(
            f"activation {name!r} is not supported; supported: {', '.join(sorted(ACTIVATION_NAMES))}"
        )
    return ACTIVATION_NAMES[name]


def _install_split(
    block: nn.Module,
    spec: FFNSpec,
    parts: dict[str, nn.Module],
    activation: str,
    router: Router,
    index: int,
) -> SplitSparseFFN:
    up, down = parts["up"], parts["down"]
    assert spec.up is not None
    assert isinstance(up, nn.Linear)
    assert isinstance(down, nn.Linear)
    deferred = DeferredLinear.take(up)
    ffn = SplitSparseFFN(deferred, down, parts["act"], activation=activation, router=router, layer_index=index)
    block.set_submodule(spec.up, deferred)
    block.set_submodule(spec.act, nn.Identity())
    block.set_submodule(spec.down, ffn)
    return ffn


def _down_shape(down: nn.Module) -> tuple[int, int]:
    """(d_ff, d_model) of an output projection, ``nn.Linear`` or ``Conv1D``."""
    rows, columns = down.get_parameter("weight").shape
    return (int(columns), int(rows)) if isinstance(down, nn.Linear) else (int(rows), int(columns))
