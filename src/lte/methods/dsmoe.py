"""DSMoE: sigmoid gates on neighbouring neurons, trained with the model (EMNLP 2025); the recipe nearest to LTE's."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from lte.config import register_method
from lte.methods.lte import LTE, LTEConfig


class DSMoEConfig(LTEConfig):
    """The FFN cut into equal pieces as it is, and gates that start from chance.

    Here a threshold holds the sparsity, where the published method has a coefficient of a sparsity loss
    (``training.eta``).
    """

    method = "dsmoe"

    expert_size: Annotated[int, pydantic.Field(ge=1)] = 128
    grouping: str = "none"
    router_init: Literal["energy", "random"] = "random"


@register_method(DSMoEConfig)
class DSMoE(LTE):
    """Learns gates of pieces."""

    decides = "a linear router of pieces, trained"
