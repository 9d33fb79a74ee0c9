"""Linear FLOPs and parameters of a model, dense and sparse, counted as the LTE paper counts them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lte.families import blocks_of, family_spec
from lte.nn import SparseFFN, sparse_ffns

GFLOP = 2**30
"""FLOPs in one GFLOP as the paper counts them (section 5.2: LLaMA-7B has 12.06 = 4.00 attention + 8.06 FFN)."""


@dataclass(frozen=True)
class LayerCost:
    """Weights of one transformer block. One weight is one multiply-add, 2 FLOPs, per token.

    Attributes:
        attention: weights of the linear layers outside the FFN.
        ffn: weights of the FFN's matrices.
        router: weights of the router.
        experts: number of experts; 0 for a dense layer.
    """

    attention: int
    ffn: int
    router: int
    experts: int


def layer_costs(model: nn.Module) -> list[LayerCost]:
    """One entry per block. Embeddings, the LM head, norms and the attention's own products are not counted."""
    ffns = sparse_ffns(model)
    costs = []
    for index, block in enumerate(blocks_of(model)):
        ffn = ffns[index] if ffns else None
        router = sum(matrix.numel() for matrix in ffn.router.matrices()) if ffn else 0
        matrices = sum(p.numel() for p in block.parameters() if p.ndim == 2) - router
        ffn_weights = _ffn_weights(ffn) if ffn else _dense_ffn_weights(model, block)
        costs.append(
            LayerCost(
                attention=matrices - ffn_weights,
                ffn=ffn_weights,
                router=router,
                experts=ffn.router.n_experts if ffn else 0,
            )
        )
    return costs


def gflops_per_token(costs: Sequence[LayerCost], sparsity_per_layer: Sequence[float]) -> dict[str, float]:
    """GFLOPs (2^30) per token: ``dense``; ``sparse``, router included; and ``router`` alone.

    Args:
        costs: of every block.
        sparsity_per_layer: share of FFN neurons not used, per block; zeros for a dense model.
    """
    flops = 2 / GFLOP
    router = sum(cost.router for cost in costs) * flops
    dense = sum(cost.attention + cost.ffn for cost in costs) * flops
    used = sum(
        cost.attention + cost.ffn * (1 - sparsity) for cost, sparsity in zip(costs, sparsity_per_layer, strict=True)
    )
    return {"dense": dense, "sparse": used * flops + router, "router": router}


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Parameters in all, in the FFNs and in the routers; tied ones once."""
    costs = layer_costs(model)
    return {
        "total": sum(p.numel() for p in model.parameters()),
        "ffn": sum(cost.ffn for cost in costs),
        "router": sum(p.numel() for ffn in sparse_ffns(model) for p in ffn.router.parameters()),
    }


def _ffn_weights(ffn: SparseFFN) -> int:
    weights = ffn.weights()
    matrices: list[Tensor | None] = [weights.gate, weights.up, weights.down]
    return sum(matrix.numel() for matrix in matrices if matrix is not None)


def _dense_ffn_weights(model: nn.Module, block: nn.Module) -> int:
    parts = family_spec(model).parts()
    paths = [parts[role] for role in ("gate", "up", "gate_up", "down") if role in parts]
    return sum(p.numel() for path in paths for p in block.get_submodule(path).parameters() if p.ndim == 2)
