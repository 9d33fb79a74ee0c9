"""A predictor of low rank, trained with the model, keeps k of every bank of neurons."""

from __future__ import annotations

from typing import Annotated

import pydantic
from torch import nn

from lte.config import register_method
from lte.methods.dejavu import DejaVu, DejaVuConfig
from lte.nn import PredictorRouter, Router


class BankTopKConfig(DejaVuConfig):
    """Every token gets the same number of neurons of every bank of neighbours; the predictor is trained on.

    Attributes:
        sparsity: 0.75 keeps 16 of 64.
        bank: neurons of a bank.
    """

    method = "bank-topk"

    sparsity: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.75
    bank: Annotated[int, pydantic.Field(ge=2)] = 64


@register_method(BankTopKConfig)
class BankTopK(DejaVu):
    """Starts from a predictor of the largest activations of every bank."""

    trains = True
    decides = "a predictor of low rank, trained with the model"
    config: BankTopKConfig

    @property
    def learns(self) -> bool:
        """See :class:`Method`."""
        return True

    def make_router(self, d_model: int, n_experts: int, like: nn.Parameter) -> Router:
        """See :class:`Method`."""
        c = self.config
        return PredictorRouter(
            d_model, n_experts, sparsity=c.sparsity, rank=c.rank, bank=c.bank, learned=True, device=like.device
        )
