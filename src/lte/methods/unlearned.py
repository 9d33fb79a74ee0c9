"""What methods share in which what decides is given, or fitted before any training, and then stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch

from lte.config import Method, MethodConfig
from lte.grouping import Activations
from lte.nn import SparseFFN

ConfigT = TypeVar("ConfigT", bound=MethodConfig)


class UnlearnedMethod(Method[ConfigT]):
    """Base of such methods."""

    looks_at_loss = False

    @property
    def learns(self) -> bool:
        """See :class:`Method`."""
        return False

    def init_routers(
        self, ffns: Sequence[SparseFFN], activations: Iterator[Activations] | None, generator: torch.Generator
    ) -> None:
        """See :class:`Method`; here there is nothing to fill."""
