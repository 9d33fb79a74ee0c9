"""Reaching a sparsity: a controller that reads it after every step and sets the pressure for the next."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

GAIN, INTEGRAL_GAIN = 10.0, 1.0
"""Proportional and integral gain: efficiency-loss weight per unit of missing sparsity, and per unit and step."""

SHIFT_GAIN = 1.0
"""Where routers are frozen: logits by which thresholds move per unit of missing sparsity and step."""


@dataclass
class SparsityController:
    """A proportional-integral controller of the weight of the efficiency loss.

    The task's own push on the scores differs between models by orders of magnitude, and so does the weight that
    balances it; the integral finds it. The weight may become negative: a model that is sparser than asked for is
    opened up again. Frozen routers do not answer to a loss; there the thresholds are moved instead.

    Attributes:
        target: sparsity to be reached.
        integral: the weight that has built up.
        sparsity: as last measured.
    """

    target: float
    integral: float = 0.0
    sparsity: float | None = None

    def eta(self, ramp: float) -> float:
        """Weight of the efficiency loss for the next step.

        Args:
            ramp: in [0, 1], how far the target's warm-up is.
        """
        return self.integral + GAIN * self._missing(ramp)

    def update(self, sparsity: float, ramp: float, *, frozen: bool) -> float:
        """Take over what the step that just ended measured; how far thresholds are to move, in logits.

        Args:
            sparsity: of the hard mask, over the tokens of the step.
            ramp: of that step.
            frozen: whether the routers are.
        """
        self.sparsity = sparsity
        if frozen:
            return SHIFT_GAIN * self._missing(ramp)
        self.integral += INTEGRAL_GAIN * self._missing(ramp)
        return 0.0

    def _missing(self, ramp: float) -> float:
        """Of the target as far as it is warmed up, the sparsity that is not there yet."""
        return self.target * (1 - (1 - ramp) ** 3) - (self.sparsity or 0.0)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {key: value for key, value in asdict(self).items() if key != "target"}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        for key, value in state.items():
            setattr(self, key, value)
