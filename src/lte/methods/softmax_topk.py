"""Noisy top-k softmax routing, as mixtures of experts have it: the router LTE's paper argues against (section 3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import pydantic
import torch
from torch import nn

from lte.config import FixedShareConfig, Method, register_method
from lte.grouping import Activations
from lte.nn import Router, SparseFFN, TopKSoftmaxRouter


class TopKConfig(FixedShareConfig):
    """Every token gets the same share of the experts, those with the largest softmax scores.

    Attributes:
        noise: standard deviation of the noise on the logits in training.
        router_init_std: standard deviation of the initial router logits, for inputs of unit variance.
    """

    method = "softmax-topk"

    noise: Annotated[float, pydantic.Field(ge=0)] = 1.0
    router_init_std: Annotated[float, pydantic.Field(ge=0)] = 0.3


@register_method(TopKConfig)
class TopK(Method[TopKConfig]):
    """Softmax scores, the largest run."""

    decides = "a softmax router, trained"

    def make_router(self, d_model: int, n_experts: int, like: nn.Parameter) -> Router:
        """See :class:`Method`."""
        k = max(1, round(n_experts * (1 - self.config.sparsity)))
        return TopKSoftmaxRouter(d_model, n_experts, k=k, noise=self.config.noise, device=like.device)

    def init_routers(
        self, ffns: Sequence[SparseFFN], activations: Iterator[Activations] | None, generator: torch.Generator
    ) -> None:
        """See :class:`Method`."""
        for ffn in ffns:
            assert isinstance(ffn.router, TopKSoftmaxRouter)
            ffn.router.reset_parameters(generator, init_std=self.config.router_init_std, init_score=0.5)
