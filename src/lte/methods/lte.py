"""LTE: a learned sigmoid router with a threshold (Zheng et al., NeurIPS 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import pydantic
import torch
from torch import Tensor, nn

from lte.config import MethodConfig, register_method
from lte.grouping import Calibration, LinearFit
from lte.nn import LowRankRouter, SparseFFN, ThresholdRouter


@register_method
class LTEConfig(MethodConfig):
    """Settings of LTE that belong to the model; those of its training are in :class:`lte.LTETrainingArguments`.

    Attributes:
        threshold: tau; an expert runs where its score is above it.
        router_bias: whether the routers have a bias.
        router_rank: width of a hidden layer in the routers; None for linear routers.
        router_init: ``energy`` fits every router, by ridge regression on the calibration data, to the norm of its
            experts' outputs times the sensitivity of the loss to the layer's output (for data with one label per
            row, to that of the token), so that training starts from a good guess; ``random`` draws its weights.
        router_init_std: standard deviation of the initial router logits; None for 2 (``energy``) or 0.3 (``random``).
        router_init_score: score the routers start from, for ``energy`` that of the median expert; None for 0.5
            (``energy``) or 0.95 (``random``), or 0.5 without a bias.
    """

    method = "lte"

    threshold: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.5
    router_bias: bool = True
    router_rank: Annotated[int | None, pydantic.Field(ge=1)] = None
    router_init: Literal["energy", "random"] = "energy"
    router_init_std: Annotated[float | None, pydantic.Field(ge=0)] = None
    router_init_score: Annotated[float | None, pydantic.Field(gt=0, lt=1)] = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _start_without_bias(cls, values: dict[str, Any]) -> dict[str, Any]:
        return values if values.get("router_bias", True) else {"router_init": "random", **values}

    @pydantic.model_validator(mode="after")
    def _bias_for_score(self) -> LTEConfig:
        if not self.router_bias and (self.router_init_score not in (None, 0.5) or self.router_init == "energy"):
            raise ValueError("router_bias=false needs router_init=random and router_init_score=0.5")
        return self

    @property
    def start(self) -> tuple[float, float]:
        """Standard deviation of the logits, and score, that routers start from."""
        std, score = (2.0, 0.5) if self.router_init == "energy" else (0.3, 0.95 if self.router_bias else 0.5)
        return (
            std if self.router_init_std is None else self.router_init_std,
            score if self.router_init_score is None else self.router_init_score,
        )

    @property
    def needs_calibration(self) -> bool:
        """See :class:`MethodConfig`."""
        return super().needs_calibration or self.router_init == "energy"

    def describe_calibration(self) -> str:
        """See :class:`MethodConfig`."""
        return super().describe_calibration() if super().needs_calibration else f"router_init={self.router_init!r}"

    def make_router(self, d_model: int, n_experts: int, like: nn.Parameter) -> ThresholdRouter:
        """See :class:`MethodConfig`."""
        kwargs = {"threshold": self.threshold, "bias": self.router_bias, "device": like.device}
        if self.router_rank is not None:
            return LowRankRouter(d_model, n_experts, rank=self.router_rank, **kwargs)  # type: ignore[arg-type]
        return ThresholdRouter(d_model, n_experts, **kwargs)  # type: ignore[arg-type]

    def init_routers(
        self, ffns: Sequence[SparseFFN], calibration: Sequence[Calibration] | None, generator: torch.Generator
    ) -> None:
        """See :class:`MethodConfig`."""
        std, score = self.start
        for ffn in ffns:
            ffn.router.reset_parameters(generator, init_std=std, init_score=score)
        if self.router_init == "energy":
            assert calibration is not None
            _fit_routers(ffns, calibration, std, score)


@torch.no_grad()
def _fit_routers(ffns: Sequence[SparseFFN], calibration: Sequence[Calibration], std: float, score: float) -> None:
    """Make logits an affine map, one for all layers, of the predicted weight of each expert in the loss."""
    fits: list[LinearFit] = []
    predictions: list[Tensor] = []
    for ffn, seen in zip(ffns, calibration, strict=True):
        norms_TE = _output_norms(ffn, seen)
        scale: Tensor | float
        if seen.token_sensitivity_T is not None:
            scale = seen.token_sensitivity_T[:, None]
        else:
            scale = seen.sensitivity if seen.sensitivity is not None else 1 / float(norms_TE.mean())
        if isinstance(ffn.router, LowRankRouter):
            features = torch.relu(seen.inputs_TD.float() @ ffn.router.reduce.detach().float().cpu().T)
            seen = replace(seen, inputs_TD=features)
        fit = seen.fit(norms_TE * scale)
        fits.append(fit)
        predictions.append((seen.inputs_TD.float() @ fit.weight.T + fit.bias).flatten())
    every = torch.cat(predictions)
    spread, centre = float(every.std()), float(every.median())
    slope = std / spread if spread > 0 else 0.0
    start = float(torch.logit(torch.tensor(score)))
    for ffn, fit in zip(ffns, fits, strict=True):
        assert ffn.router.bias is not None
        ffn.router.weight.copy_(fit.weight * slope)
        ffn.router.bias.copy_((fit.bias - centre) * slope + start)


def _output_norms(ffn: SparseFFN, seen: Calibration) -> Tensor:
    """Norm of every expert's output, [T, E]."""
    down_EKD = ffn.weights().down.detach().float().cpu().unflatten(0, (ffn.router.n_experts, -1))
    hidden_TEK = seen.hidden_TF.float().unflatten(1, (ffn.router.n_experts, -1))
    return torch.stack(
        [(hidden_TEK[:, expert] @ down_KD).norm(dim=1) for expert, down_KD in enumerate(down_EKD)], dim=1
    )
