"""The speed model: how much faster decoding can get, from a config and a sparsity.

Decoding one sequence reads every weight once per token and computes little with it, so time is bytes over bandwidth:
the gain is bounded by the share of the bytes that belongs to the FFN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lte.accounting import model_cost
from lte.bench.shapes import SHAPES, meta_model, model_config
from lte.errors import ConfigError
from lte.nn import ROUTER_DTYPE


@dataclass(frozen=True)
class DecodeBytes:
    """Bytes one decode step at batch 1 reads.

    Attributes:
        attention: weights of the attention's linear layers.
        ffn: weights of the FFNs.
        head: weights of the LM head.
        router: weights of the routers.
        cache: keys and values of the context.
    """

    attention: int
    ffn: int
    head: int
    router: int
    cache: int = 0

    @property
    def dense(self) -> int:
        """Bytes of a dense step."""
        return self.attention + self.ffn + self.head + self.cache

    @property
    def ffn_share(self) -> float:
        """Share of the dense bytes that belongs to the FFN."""
        return self.ffn / self.dense

    def sparse(self, sparsity: float, *, router: bool = True) -> float:
        """Bytes of a step at an FFN sparsity."""
        return self.dense - sparsity * self.ffn + (self.router if router else 0)

    def speedup(self, sparsity: float, *, router: bool = True) -> float:
        """The best possible speed-up of decoding over dense."""
        return self.dense / self.sparse(sparsity, router=router)


def decode_bytes(config: Any, *, expert_size: int = 32, weight_bytes: int = 2, context: int = 0) -> DecodeBytes:
    """Count a model by its config.

    Args:
        config: a transformers config.
        expert_size: neurons per expert.
        weight_bytes: bytes of a weight, but for the routers', which are float32; 2 for bf16.
        context: tokens in the KV cache.
    """
    model = meta_model(config)
    layers = model_cost(model).layers
    d_model = model.get_input_embeddings().weight.shape[1]
    d_ff = _d_ff(config)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or d_model // heads
    return DecodeBytes(
        attention=weight_bytes * sum(c.attention for c in layers),
        ffn=weight_bytes * sum(c.ffn for c in layers),
        head=weight_bytes * model.get_output_embeddings().weight.numel(),
        router=ROUTER_DTYPE.itemsize * len(layers) * d_model * -(-d_ff // expert_size),
        cache=weight_bytes * len(layers) * 2 * kv_heads * head_dim * context,
    )


def _d_ff(config: Any) -> int:
    for name in ("intermediate_size", "ffn_dim", "n_inner"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    return 4 * int(config.hidden_size)


def bench_limit(
    names: Sequence[str] = tuple(SHAPES),
    sparsities: Sequence[float] = (0.5, 0.8, 0.9),
    *,
    expert_size: int = 32,
    weight_bytes: int = 2,
    context: int = 0,
) -> list[dict[str, Any]]:
    """One row per model and sparsity; see :class:`DecodeBytes`."""
    if context < 0 or expert_size < 1:
        raise ConfigError(f"context={context}, expert_size={expert_size}: at least 0 and 1")
    for sparsity in sparsities:
        if not 0 <= sparsity <= 1:
            raise ConfigError(f"sparsity={sparsity} is out of range; it is the share left out, from 0 to 1")
    rows = []
    for name in names:
        count = decode_bytes(model_config(name), expert_size=expert_size, weight_bytes=weight_bytes, context=context)
        rows += [
            {
                "config": name,
                "sparsity": sparsity,
                "gbytes_per_token": count.dense / 1e9,
                "sparse_gbytes_per_token": count.sparse(sparsity) / 1e9,
                "ffn_share": count.ffn_share,
                "router_share": count.router / count.dense,
                "limit_speedup": count.speedup(sparsity),
                "limit_speedup_without_router": count.speedup(sparsity, router=False),
                "context": context,
            }
            for sparsity in sparsities
        ]
    return rows
