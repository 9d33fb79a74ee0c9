"""LTE: a learned sigmoid router with a threshold (Zheng et al., NeurIPS 2024)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import pydantic
import torch
from torch import Tensor, nn

from lte.config import Method, MethodConfig, register_method
from lte.grouping import Activations
from lte.nn import LowRankRouter, SparseFFN, ThresholdRouter


class LTEConfig(MethodConfig):
    """Settings of LTE that belong to the model; those of its training are in :class:`lte.LTETrainingArguments`.

    Attributes:
        threshold: tau; an expert runs where its score is above it.
        router_bias: whether the routers have a bias.
        router_rank: width of a hidden layer in the routers; None for linear routers.
        router_init: ``energy`` fits every router, by ridge regression on the calibration data, to the logarithm of the
            norm of its experts' outputs times the sensitivity of the loss to the layer's output (for data with one
            label per row, to that of the token), so that training starts from a good guess; ``random`` draws its
            weights.
        router_init_std: standard deviation of the initial router logits, from their quartiles; None for 2 (``energy``)
            or 0.3 (``random``).
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


class LTEPaperConfig(LTEConfig):
    """LTE as published: experts by k-means, routers from chance, two stages of training (see ``--preset paper``)."""

    method = "lte-paper"

    grouping: str = "kmeans"
    router_init: Literal["energy", "random"] = "random"


@register_method(LTEConfig)
class LTE(Method[LTEConfig]):
    """Linear routers on experts, or routers with a hidden layer."""

    decides = "a linear router, trained"
    kernels = "decide and run"

    @property
    def needs_calibration(self) -> str | None:
        """See :class:`Method`."""
        of_routers = "router_init='energy'" if self.config.router_init == "energy" else None
        return super().needs_calibration or of_routers

    def make_router(self, d_model: int, n_experts: int, like: nn.Parameter) -> ThresholdRouter:
        """See :class:`Method`."""
        config = self.config
        kwargs = {"threshold": config.threshold, "bias": config.router_bias, "device": like.device}
        if config.router_rank is not None:
            return LowRankRouter(d_model, n_experts, rank=config.router_rank, **kwargs)  # type: ignore[arg-type]
        return ThresholdRouter(d_model, n_experts, **kwargs)  # type: ignore[arg-type]

    def init_routers(
        self, ffns: Sequence[SparseFFN], activations: Iterator[Activations] | None, generator: torch.Generator
    ) -> None:
        """See :class:`Method`."""
        std, score = self.config.start
        routers = [ffn.router for ffn in ffns if isinstance(ffn.router, ThresholdRouter)]
        for router in routers:
            router.reset_parameters(generator, init_std=std, init_score=score)
        if self.config.router_init == "energy":
            assert activations is not None
            _fit_routers(ffns, routers, activations, std, score)


@register_method(LTEPaperConfig)
class LTEPaper(LTE):
    """The same, trained in two stages."""

    decides = "a linear router, two stages"
    preset = "paper"


SAMPLED = 65536
"""Predictions of one layer from which the spread over all layers is taken."""

FLOOR = 1e-2
"""Share of a layer's typical weight in the loss below which an expert's is no smaller: the logarithm needs one."""


@torch.no_grad()
def _fit_routers(
    ffns: Sequence[SparseFFN],
    routers: Sequence[ThresholdRouter],
    activations: Iterator[Activations],
    std: float,
    score: float,
) -> None:
    """Make logits an affine map, one for all layers, of the predicted logarithm of each expert's weight in the loss.

    The weight is the norm of the expert's output times the layer's (or token's) sensitivity. On the scale of logarithms
    every layer's spread is of order one, and outliers are a few units away from the rest instead of a few thousand; the
    spread over all layers is taken from quartiles, which outliers do not move.
    """
    samples: list[Tensor] = []
    for ffn, router, seen in zip(ffns, routers, activations, strict=True):
        assert router.bias is not None
        features = _features(router)
        fit = seen.fit(_log_weights(ffn, seen), features)
        step = max(1, len(seen.inputs_TD) * router.n_experts // SAMPLED)
        x_tD = seen.inputs_TD[::step].float()
        predicted = (x_tD if features is None else features(x_tD)) @ fit.weight.T + fit.bias
        samples.append(predicted.flatten().cpu())
        router.weight.copy_(fit.weight)
        router.bias.copy_(fit.bias)
    every = torch.cat([sample[:: max(1, len(sample) * len(samples) // 2**23)] for sample in samples]).sort().values
    low, centre, high = (float(every[int(share * (len(every) - 1))]) for share in (0.25, 0.5, 0.75))
    spread = (high - low) / NORMAL_QUARTILES
    slope = std / spread if spread > 0 else 0.0
    start = float(torch.logit(torch.tensor(score)))
    for router in routers:
        assert router.bias is not None
        router.weight.mul_(slope)
        router.bias.sub_(centre).mul_(slope).add_(start)


NORMAL_QUARTILES = 1.349
"""Distance of a normal distribution's quartiles, in standard deviations."""


def _features(router: ThresholdRouter) -> Callable[[Tensor], Tensor] | None:
    if not isinstance(router, LowRankRouter):
        return None
    return lambda x_tD: torch.relu(x_tD.float() @ router.reduce.detach().float().T)


def _log_weights(ffn: SparseFFN, seen: Activations) -> Callable[[slice, Tensor], Tensor]:
    """(which tokens, hidden values) -> logarithm of the weight of every expert in the loss, [t, E]."""
    of_tokens = seen.token_sensitivity_T
    typical = torch.cat([ffn.expert_norms(hidden_tF) for _, (_, hidden_tF) in seen.chunks(step=8)])
    typical = typical[typical > 0].median() if (typical > 0).any() else typical.new_ones(())
    scale = seen.sensitivity if seen.sensitivity is not None else 1 / float(typical)
    mean_scale = scale if of_tokens is None else float(of_tokens.mean())
    floor = (FLOOR * mean_scale * typical).clamp_min(1e-30)

    def targets(part: slice, hidden_tF: Tensor) -> Tensor:
        norms_tE = ffn.expert_norms(hidden_tF)
        weights_tE = norms_tE * (scale if of_tokens is None else of_tokens[part, None].to(norms_tE.device))
        return (weights_tE + floor).log()

    return targets
