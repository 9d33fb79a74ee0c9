"""FLOPs, bytes and parameters of a model, dense and sparse; FLOPs are counted as the LTE paper counts them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lte.families import blocks_of, family_spec
from lte.nn import QuantizedEmbedding, QuantizedWeight, RouterCost, SparseFFN, Thresholded, TiedHead, sparse_ffns

GFLOP = 2**30
"""FLOPs in one GFLOP as the paper counts them (section 5.2: LLaMA-7B has 12.06 = 4.00 attention + 8.06 FFN)."""


@dataclass(frozen=True)
class LayerCost:
    """One transformer block. One weight is one multiply-add, 2 FLOPs, per token.

    Attributes:
        attention: weights of the linear layers outside the FFN.
        ffn: weights of the FFN's matrices, those that were taken out too.
        ffn_bytes: of these, at their dtype.
        experts: number of experts; 0 for a dense layer.
        router: what deciding takes; nothing for a dense layer.
        spared: of the FFN's bytes, those that are not read where a neuron runs on its upper bits, had all run.
        attention_saved: of ``attention``, what small inputs leave out, by the text that thresholds were found on.
        attention_saved_bytes: of it, at its dtype.
    """

    attention: int
    ffn: int
    ffn_bytes: int
    experts: int
    router: RouterCost
    spared: float = 0.0
    attention_saved: float = 0.0
    attention_saved_bytes: float = 0.0

    def saved_bytes(self, sparsity: float) -> float:
        """Bytes of the FFN that are not read."""
        return self.ffn_bytes * sparsity + self.spared * (1 - sparsity)

    def multiplies(self, sparsity: float) -> float:
        """Multiply-adds of the FFN and of deciding."""
        return self.ffn * (1 - sparsity) + self.deciding(sparsity)[0]

    def deciding(self, sparsity: float) -> tuple[float, float]:
        """Multiply-adds and bytes that deciding takes beyond the neurons that run.

        Where it is a part of the FFN itself, that is the part of the neurons that do not run.
        """
        share = sparsity if self.router.of_ffn else 1.0
        return self.router.multiplies * share, self.router.bytes * share


@dataclass(frozen=True)
class ModelCost:
    """A model's blocks, and what is read besides.

    Attributes:
        layers: one entry per block.
        dense_bytes: read by a dense model for one token: all weights, of embeddings only those that are the head.
    """

    layers: tuple[LayerCost, ...]
    dense_bytes: int

    def gflops_per_token(self, sparsity_per_layer: Sequence[float]) -> dict[str, float]:
        """GFLOPs (2^30) per token: ``dense``; ``sparse``, router included; and ``router`` alone.

        Embeddings, the LM head, norms and the attention's own products are not counted.

        Args:
            sparsity_per_layer: share of FFN neurons not used, per sparse FFN; none for a dense model.
        """
        flops = 2 / GFLOP
        saved = self._saved(sparsity_per_layer)
        router = sum(layer.deciding(sparsity)[0] for layer, sparsity in self._sparse(sparsity_per_layer)) * flops
        dense = sum(layer.attention + layer.ffn for layer in self.layers) * flops
        return {"dense": dense, "sparse": dense - saved * flops + router, "router": router}

    def linear_sparsity(self, sparsity_per_layer: Sequence[float]) -> float:
        """Share of the weights of all the blocks' linear layers, attention's too, that is not used."""
        return self._saved(sparsity_per_layer) / sum(layer.attention + layer.ffn for layer in self.layers)

    def bytes_per_token(self, sparsity_per_layer: Sequence[float]) -> dict[str, float]:
        """Bytes of weights read for one token that comes alone, the head's and the norms' too: what decoding waits for.

        The keys and ``sparsity_per_layer`` are those of :meth:`gflops_per_token`. The KV cache is not counted.
        """
        saved = sum(layer.saved_bytes(sparsity) for layer, sparsity in self._sparse(sparsity_per_layer))
        saved += sum(layer.attention_saved_bytes for layer in self.layers)
        router = sum(layer.deciding(sparsity)[1] for layer, sparsity in self._sparse(sparsity_per_layer))
        return {"dense": self.dense_bytes, "sparse": self.dense_bytes - saved + router, "router": router}

    def _saved(self, sparsity_per_layer: Sequence[float]) -> float:
        """Weights of the linear layers that are not used."""
        of_ffns = sum(layer.ffn * sparsity for layer, sparsity in self._sparse(sparsity_per_layer))
        return of_ffns + sum(layer.attention_saved for layer in self.layers)

    def _sparse(self, sparsity_per_layer: Sequence[float]) -> Iterator[tuple[LayerCost, float]]:
        return zip((layer for layer in self.layers if layer.experts), sparsity_per_layer, strict=True)


def model_cost(model: Any) -> ModelCost:
    """Count a model of a known family, dense or sparse."""
    layers = tuple(_layer_cost(model, block) for block in blocks_of(model))
    routers = {id(p) for ffn in sparse_ffns(model) for p in ffn.router.parameters()}
    head = model.get_output_embeddings()
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    of_head = {id(p) for p in head.parameters()} if head is not None else set()
    skipped = routers | ({id(table) for table in tables} - of_head)
    read = sum(p.nbytes for p in model.parameters() if id(p) not in skipped)
    unread = QuantizedEmbedding if not isinstance(head, TiedHead) else ()
    read += sum(m.nbytes for m in model.modules() if isinstance(m, QuantizedWeight) and not isinstance(m, unread))
    pairs = zip((layer for layer in layers if layer.experts), sparse_ffns(model), strict=True)
    removed = sum(round(layer.ffn_bytes * ffn.removed_weights / layer.ffn) for layer, ffn in pairs)
    return ModelCost(layers, read + removed)


def _layer_cost(model: Any, block: nn.Module) -> LayerCost:
    ffn = next((module for module in block.modules() if isinstance(module, SparseFFN)), None)
    spared = 0.0
    if ffn is None:
        parts = family_spec(model).parts()
        paths = [parts[role] for role in ("gate", "up", "gate_up", "down") if role in parts]
        matrices: list[Any] = [p for path in paths for p in block.get_submodule(path).parameters() if p.ndim == 2]
        router, experts, of_router = RouterCost(0, 0, 0), 0, set()
    else:
        rounded = [part for part in ffn.projections() if isinstance(part, QuantizedWeight)]
        matrices = [*rounded]
        if not rounded:
            weights = ffn.weights()
            matrices = [matrix for matrix in (weights.gate, weights.up, weights.down) if matrix is not None]
        spared = sum(part.spared for part in rounded) * (1 - ffn.router.fine_share)
        router, experts, of_router = ffn.router.cost(), ffn.router.n_experts, {id(p) for p in ffn.router.parameters()}
    ffn_weights = sum(matrix.numel() for matrix in matrices)
    removed = 0 if ffn is None else ffn.removed_weights
    ffn_bytes = round(sum(matrix.nbytes for matrix in matrices) * (1 + removed / ffn_weights))
    every = sum(p.numel() for p in block.parameters() if p.ndim == 2 and id(p) not in of_router)
    every += sum(module.numel() for module in block.modules() if isinstance(module, QuantizedWeight))
    left_out = [(module.share, module.weight) for module in block.modules() if isinstance(module, Thresholded)]
    return LayerCost(
        *(every - ffn_weights, ffn_weights + removed, ffn_bytes, experts, router, spared),
        attention_saved=sum(share * weight.numel() for share, weight in left_out),
        attention_saved_bytes=sum(share * weight.nbytes for share, weight in left_out),
    )


def parameter_counts(model: Any) -> dict[str, int]:
    """Parameters in all, in the FFNs and for the routers; tied ones once."""
    layers = model_cost(model).layers
    rounded = sum(module.numel() for module in model.modules() if isinstance(module, QuantizedWeight))
    return {
        "total": sum(p.numel() for p in model.parameters() if p.ndim) + rounded,
        "ffn": sum(layer.ffn for layer in layers),
        "router": sum(layer.router.parameters for layer in layers),
    }
