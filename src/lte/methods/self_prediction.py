"""Self-prediction: the FFN's own coarse copy picks the neurons. Nothing is learned, and little is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import pydantic
from torch import Tensor, nn

from lte.config import MethodConfig, register_method
from lte.grouping import Activations
from lte.methods.block_inputs import MOST, attention_parts, fit_blocks, threshold_attention
from lte.methods.scores import ScoreMethod
from lte.nn import CopyRouter, Mode, Router, ScoreRouter, set_mode
from lte.nn.router import NOTHING

FLOOR = 1e-3
"""Importance of a column that calibration never saw used, where the mean is 1."""


class SelfPredictionConfig(MethodConfig):
    """Single neurons, picked by a copy of the FFN in few bits.

    Attributes:
        bits: of a weight of the copy.
        group: weights of the copy that share a scale.
        attention: share of the inputs of attention's projections, by their weights, that is left out where they are
            small, as TEAL does; shares of a block's are found greedily, thresholds on the calibration text.
        learned: whether training may pull the scores apart, through the rounding; otherwise thresholds follow alone.
    """

    method = "self-prediction"

    expert_size: Annotated[int, pydantic.Field(ge=1)] = 1
    grouping: str = "none"
    bits: Annotated[int, pydantic.Field(ge=1, le=4)] = 3
    group: Annotated[int, pydantic.Field(ge=32, multiple_of=32)] = 64
    attention: Annotated[float, pydantic.Field(ge=0, le=MOST)] = 0.0
    learned: bool = False


@register_method(SelfPredictionConfig)
class SelfPrediction(ScoreMethod[SelfPredictionConfig]):
    """Calibration data say how much the loss depends on every layer, so that one threshold serves all, and on what the
    copy has to be exact."""

    decides = "a copy of the FFN in few bits"
    kernels = "decide and run"

    @property
    def learns(self) -> bool:
        """See :class:`Method`."""
        return self.config.learned

    def make_router(self, d_model: int, n_experts: int, like: nn.Parameter) -> Router:
        """See :class:`Method`."""
        config = self.config
        return CopyRouter(
            d_model, n_experts, bits=config.bits, group=config.group, learned=config.learned, device=like.device
        )

    def fit(self, router: ScoreRouter, seen: Activations) -> None:
        """See :class:`ScoreMethod`: errors of the copy count by the inputs they are multiplied with."""
        assert isinstance(router, CopyRouter)
        squares_D = seen.inputs_TD.float().square().mean(0)
        router.importance.copy_(squares_D / squares_D.mean().clamp_min(NOTHING) + FLOOR)

    def install(self, model: nn.Module) -> None:
        """See :class:`Method`."""
        if self.config.attention:
            threshold_attention(model)

    def fit_blocks(self, model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """See :class:`Method`; the FFNs leave out nothing yet."""
        if not self.config.attention:
            return
        set_mode(model, Mode.DENSE)
        fit_blocks(model, batches, lambda block, ffn: attention_parts(block), self.config.attention, greedy=True)
        set_mode(model, Mode.HARD)
