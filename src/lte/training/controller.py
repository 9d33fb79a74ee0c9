"""Reaching a sparsity: a controller that reads it after every step and sets the pressure for the next."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

GAIN, INTEGRAL_GAIN = 10.0, 1.0
"""Proportional and integral gain: efficiency-loss weight per unit of missing sparsity, and per unit and step."""

LOOK_AHEAD, SMOOTHING = 8.0, 0.8
"""Steps by which the sparsity's trend is followed into the future, and the smoothing of that trend."""

INTEGRAL_LIMIT, RELEASE = 0.1, 3.0
"""Most that one step adds to the integral, and how much faster it is taken back: routers answer with a delay, and what
builds up while they are on their way would carry them past the target."""

SHIFT_GAIN = 2.0
"""Logits by which thresholds move per unit of missing sparsity and step, where thresholds are what is moved."""


@dataclass
class SparsityController:
    """A controller of the weight of the efficiency loss: proportional, integral, with a look ahead.

    The task's own push on the scores differs between models by orders of magnitude, and so does the weight that
    balances it; the integral finds it. The weight may become negative: a model that is sparser than asked for is
    opened up again. Frozen routers do not answer to a loss, nor do routers whose learning rate has nearly run out;
    there thresholds are moved.

    Attributes:
        target: sparsity to be reached.
        start: sparsity as first measured, from which the target warms up.
        integral: the weight that has built up.
        sparsity: as last measured.
        trend: by how much it changes in a step.
    """

    target: float
    start: float | None = None
    integral: float = 0.0
    sparsity: float | None = None
    trend: float = 0.0

    def eta(self, ramp: float) -> float:
        """Weight of the efficiency loss for the next step.

        Args:
            ramp: in [0, 1], how far the target's warm-up is.
        """
        return self.integral + GAIN * self._missing(ramp, LOOK_AHEAD)

    def update(self, sparsity: float, ramp: float) -> None:
        """Take over what the step that just ended measured.

        Args:
            sparsity: of the hard mask, over the tokens of the step.
            ramp: of that step.
        """
        if self.sparsity is None:
            self.start = sparsity
        else:
            self.trend = SMOOTHING * self.trend + (1 - SMOOTHING) * (sparsity - self.sparsity)
        self.sparsity = sparsity
        missing = self._missing(ramp, LOOK_AHEAD)
        gain = INTEGRAL_GAIN * (RELEASE if missing * self.integral < 0 else 1.0)
        self.integral += gain * min(max(missing, -INTEGRAL_LIMIT), INTEGRAL_LIMIT)

    def shift(self, ramp: float) -> float:
        """How far thresholds are to move, in logits, where it is they that are moved."""
        return SHIFT_GAIN * self._missing(ramp, 0.0)

    def _missing(self, ramp: float, steps: float) -> float:
        """Of the target as far as it is warmed up, the sparsity that will not be there in so many steps."""
        if self.sparsity is None or self.start is None:
            return 0.0
        wanted = self.target - (self.target - self.start) * (1 - ramp) ** 3
        return wanted - self.sparsity - steps * self.trend

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {key: value for key, value in asdict(self).items() if key != "target"}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        for key, value in state.items():
            setattr(self, key, value)
