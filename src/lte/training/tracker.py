"""Holding a sparsity in training: thresholds follow a quantile, and a step that went wrong counts for less."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from lte.margins import Margins

RATE = 0.35
"""Share of what the probe misses its aim by that thresholds make up for in a step: sparser layers change what later
ones see."""

APART, CHANGE = 2048, 0.01
"""Tokens of steps for which the probe is run once, where steps are of fewer: it would cost more than they do. Unless
its sparsity is expected to change by more than so much until then."""

MEMORY = 8192
"""Tokens whose mean counts, where steps say something of the data: a step of as many changes it by half."""

BAND, ON_TARGET = 0.05, 0.02
"""Furthest that a step's sparsity may be from the one wanted, and the mean over :data:`LAST` from the target."""

SAMPLING = 2.0
"""Both may be so many times ``tokens ** -0.5`` where that is more: few tokens are not like the average, the less so as
those of a row, and rows batched by their length, are alike."""

LAST = 0.1
"""Share of the training whose mean sparsity is the one trained at."""

JUMP, JUMP_SHARE, SMOOTHING, SETTLED = 8.0, 1.25, 0.9, 10
"""A task loss has jumped that is so many mean deviations and so many times above its running mean, where the mean
forgets by the smoothing per step and has seen as many steps."""

BACK_OFF, RECOVERY = 0.1, 2.0
"""Factor of the learning rate of a step that went wrong, and by how much it grows back with every good one."""


@dataclass
class SparsityTracker:
    """Moves all thresholds alike so that every step runs at the sparsity wanted of it.

    The margins of decisions say where a threshold would have to be for any sparsity: their quantile. Nothing has to be
    known of the scale of the scores, nor of what pushes them. The decisions are those on a probe, a few tokens from all
    over the training data that stay the same: batches differ, most of all where rows are batched by their length, and
    thresholds that followed them would hold every kind of row at the target, each with a threshold of its own, and
    none of them at the one threshold that the model runs with.

    Attributes:
        target: sparsity to be held, once warmed up to.
        start: sparsity as first measured, from which the target warms up.
        sparsity: of the last step.
        aim: sparsity that thresholds were last moved for.
        offset: by how much more of the probe's decisions than of a step's lie below the threshold, in logits of the
            share.
        missed: by how much thresholds were off for that aim when they had moved, in logits.
        probed: sparsity of the probe then.
        passed, waited: tokens and steps since.
        change: of that sparsity by a step, of the last ones.
        factor: of the learning rate; below 1 after a step that went wrong.
        steps, loss, deviation: running mean of the task loss, its mean deviation, and of how many steps.
        push, slope: running means, by how much the losses but for the efficiency loss would change, and by how much
            the efficiency loss, were all logits moved alike.
        first_loss, last_loss: task loss of the first step, and the mean over the last ones of the training.
        last_tokens, last_sum: tokens of those, and the sum of their sparsities.
        strays: steps after the warm-up whose sparsity left the band.
    """

    target: float
    start: float | None = None
    sparsity: float | None = None
    aim: float | None = None
    offset: float = 0.0
    missed: float = 0.0
    probed: float = 0.0
    passed: float = 0.0
    waited: int = 0
    change: float = 1.0
    factor: float = 1.0
    steps: int = 0
    loss: float = 0.0
    deviation: float = 0.0
    push: float = 0.0
    slope: float = 0.0
    first_loss: float | None = None
    last_loss: float | None = None
    last_tokens: float = 0.0
    last_sum: float = 0.0
    strays: int = 0

    def wanted(self, ramp: float) -> float:
        """Sparsity wanted where the target's warm-up is at ``ramp``, in [0, 1]; steep at first, then level."""
        start = self.target if self.start is None else self.start
        return self.target - (self.target - start) * (1 - ramp) ** 3

    @property
    def price(self) -> float:
        """Weight of the efficiency loss that balances the others' push on all experts alike.

        What is left of the gradient then is which experts to run rather than others; how many, the thresholds hold.
        """
        return -self.push / self.slope if self.slope > 0 else 0.0

    def feel(self, push: float, slope: float, tokens: float = math.inf) -> None:
        """Take over the gradients of a step.

        Args:
            push: of the whole loss, summed over all logits.
            slope: of the efficiency loss alone, the same.
            tokens: of the step.
        """
        push -= self.price * slope
        keep = min(1 - _share(tokens), self.steps / (self.steps + 1))
        self.push = keep * self.push + (1 - keep) * push
        self.slope = keep * self.slope + (1 - keep) * slope

    def judge(self, sparsity: float, loss: float, ramp: float, tokens: float = math.inf) -> str | None:
        """Take over what the forward passes of a step measured; what is wrong with it, if anything is.

        Args:
            sparsity: of the hard mask, over the tokens of the step.
            loss: task loss of the step.
            ramp: of that step.
            tokens: of that step.
        """
        if self.start is None:
            self.start, self.first_loss = sparsity, loss
        self.sparsity = sparsity
        if self.aim is not None:
            missed = min(max(self.aim - sparsity, -BAND), BAND)
            self.offset += _share(tokens) * missed / (self.aim * (1 - self.aim))
        wrong = []
        if ramp >= 1 and abs(sparsity - self.wanted(ramp)) > _allowed(BAND, tokens):
            self.strays += 1
            wrong.append(f"its sparsity is {sparsity:.3f}, not {self.wanted(ramp):.3f}")
        highest = max(self.loss + JUMP * self.deviation, JUMP_SHARE * self.loss)
        if self.steps >= SETTLED and loss > highest:
            wrong.append(f"its task loss jumped from {self.loss:.3f} to {loss:.3f}")
            loss = highest  # a loss that stays up is a level to get used to, not a jump any more
        keep = min(SMOOTHING, self.steps / (self.steps + 1))
        self.deviation = keep * self.deviation + (1 - keep) * abs(loss - self.loss) * (self.steps > 0)
        self.loss = keep * self.loss + (1 - keep) * loss
        self.steps += 1
        self.factor = BACK_OFF if wrong else min(1.0, RECOVERY * self.factor)
        return " and ".join(wrong) or None

    def compare(self, probe: float, others: float) -> None:
        """Take over by how much the probe is sparser than a larger sample, both at the thresholds as they are."""
        self.offset = _odds(probe) - _odds(others)

    def pass_step(self, tokens: float) -> None:
        """Count a step, of so many tokens, since thresholds moved."""
        self.passed += tokens
        self.waited += 1

    @property
    def is_due(self) -> bool:
        """Whether they are to move after this step."""
        return self.passed >= APART or (self.waited + 1) * self.change > CHANGE

    def look(self, before: Margins) -> None:
        """Take over the margins of the probe at the weights before the first step since thresholds moved."""
        self.missed = 0.0 if self.aim is None else before.quantile(self._of_probe(self.aim))
        self.probed = before.sparsity

    def move(self, after: Margins, ramp: float) -> float:
        """By how much thresholds are to move, in logits: with the target's warm-up, with what the steps since the last
        move did to the logits, and by a share of what that move missed.

        Args:
            after: margins of the probe at the weights as they are.
            ramp: of the next step.
        """
        self.change = 1.0 if ramp < 1 else abs(after.sparsity - self.probed) / max(self.waited, 1)
        self.aim, self.passed, self.waited = self.wanted(ramp), 0.0, 0
        return after.quantile(self._of_probe(self.aim)) - (1 - RATE) * self.missed

    def _of_probe(self, sparsity: float) -> float:
        """Sparsity of the probe where steps have this one."""
        return 1 / (1 + math.exp(-_odds(sparsity) - self.offset))

    def keep_last(self, loss: float, tokens: float) -> None:
        """Count a step among the last of the training, which say at what sparsity the model was trained, and how well.

        Args:
            loss: its task loss.
            tokens: of the step.
        """
        self.last_tokens += tokens
        self.last_loss = loss if self.last_loss is None else self.last_loss
        self.last_loss += (loss - self.last_loss) * tokens / self.last_tokens
        self.last_sum += tokens * (self.sparsity or 0.0)

    @property
    def trained(self) -> float | None:
        """Sparsity the model was trained at in the end; None before the end."""
        return self.last_sum / self.last_tokens if self.last_tokens else None

    @property
    def on_target(self) -> bool:
        """Whether that is the target."""
        return self.trained is not None and abs(self.trained - self.target) <= _allowed(ON_TARGET, self.last_tokens)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {key: value for key, value in asdict(self).items() if key != "target"}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        for key, value in state.items():
            setattr(self, key, value)


def _allowed(distance: float, tokens: float) -> float:
    return max(distance, SAMPLING * tokens**-0.5)


def _odds(sparsity: float) -> float:
    """Their logarithm."""
    sparsity = min(max(sparsity, 0.001), 0.999)
    return math.log(sparsity / (1 - sparsity))


def _share(tokens: float) -> float:
    """Of a step with so many tokens in a mean over :data:`MEMORY`."""
    return 1.0 if math.isinf(tokens) else tokens / (tokens + MEMORY)
