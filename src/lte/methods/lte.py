"""LTE: a learned sigmoid router with a threshold (Zheng et al., NeurIPS 2024)."""

from __future__ import annotations

import pydantic
import torch
from torch import nn

from lte.config import MethodConfig, register_method
from lte.nn import ThresholdRouter


@register_method
class LTEConfig(MethodConfig):
    """Settings of LTE that belong to the model; those of its training are in :class:`lte.LTETrainingArguments`.

    Attributes:
        threshold: tau; an expert runs where its score is above it.
        router_bias: whether the routers have a bias.
        router_init_std: standard deviation of the initial router logits, for inputs of unit variance.
        router_init_score: score the routers start from; needs ``router_bias`` unless it is 0.5.
    """

    method = "lte"

    threshold: float = pydantic.Field(0.5, gt=0, lt=1)
    router_bias: bool = True
    router_init_std: float = pydantic.Field(0.3, ge=0)
    router_init_score: float = pydantic.Field(0.95, gt=0, lt=1)

    @pydantic.model_validator(mode="after")
    def _bias_for_score(self) -> LTEConfig:
        if not self.router_bias and self.router_init_score != 0.5:
            raise ValueError(f"router_init_score={self.router_init_score} needs router_bias=true")
        return self

    def make_router(self, d_model: int, n_experts: int, like: nn.Parameter) -> ThresholdRouter:
        """See :class:`MethodConfig`."""
        return ThresholdRouter(
            d_model,
            n_experts,
            threshold=self.threshold,
            bias=self.router_bias,
            device=like.device,
            dtype=like.dtype,
        )

    def init_router(self, router: ThresholdRouter, generator: torch.Generator) -> None:
        """See :class:`MethodConfig`."""
        router.reset_parameters(generator, init_std=self.router_init_std, init_score=self.router_init_score)
