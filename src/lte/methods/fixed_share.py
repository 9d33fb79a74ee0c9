"""What methods share under which every token gets the same share of a layer's experts, by a router nobody trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch

from lte.config import FixedShareConfig, Method
from lte.grouping import Calibration
from lte.nn import SparseFFN

ConfigT = TypeVar("ConfigT", bound=FixedShareConfig)


class FixedShareMethod(Method[ConfigT]):
    """Base of such methods."""

    @property
    def learns(self) -> bool:
        """See :class:`Method`."""
        return False

    def init_routers(
        self, ffns: Sequence[SparseFFN], calibration: Iterator[Calibration] | None, generator: torch.Generator
    ) -> None:
        """See :class:`Method`; here there is nothing to fill."""
