"""Deja Vu: a small predictor per FFN says which k neurons will be largest (Liu et al., ICML 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import pydantic
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from lte.config import FixedShareConfig, register_method
from lte.grouping import Activations
from lte.methods.predictors import fit_predictor, largest_of_banks
from lte.methods.unlearned import UnlearnedMethod
from lte.nn import PredictorRouter, Router, SparseFFN


class DejaVuConfig(FixedShareConfig):
    """Single neurons, as many for every token, picked by a predictor of low rank.

    As published, the predictor is trained on the dense model's activations and the model is not touched: ``lte
    sparsify``. ``lte train`` goes on with the model under its mask, the predictor as it is.

    Attributes:
        rank: width of the predictor's middle layer.
    """

    method = "dejavu"

    expert_size: Annotated[int, pydantic.Field(ge=1, le=1)] = 1
    grouping: str = "none"
    rank: Annotated[int, pydantic.Field(ge=1)] = 128


@register_method(DejaVuConfig)
class DejaVu(UnlearnedMethod[DejaVuConfig]):
    """Predicts the largest activations."""

    trains = False
    fitted = True
    decides = "a predictor of low rank"

    def make_router(self, d_model: int, n_experts: int, like: nn.Parameter) -> Router:
        """See :class:`Method`."""
        config = self.config
        return PredictorRouter(d_model, n_experts, sparsity=config.sparsity, rank=config.rank, device=like.device)

    def init_routers(
        self, ffns: Sequence[SparseFFN], activations: Iterator[Activations] | None, generator: torch.Generator
    ) -> None:
        """See :class:`Method`."""
        assert activations is not None
        for ffn, seen in zip(ffns, activations, strict=True):
            router = ffn.router
            assert isinstance(router, PredictorRouter)
            fit_predictor(
                router, seen, largest_of_banks(router.k, router.bank), binary_cross_entropy_with_logits, generator
            )
