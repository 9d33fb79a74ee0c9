"""The tracker against plants made up for it: it must hold a sparsity whatever the scale of the scores."""

from __future__ import annotations

import pytest
import torch

from lte.margins import Margins
from lte.nn import Routing
from lte.training import SparsityTracker
from lte.training.tracker import BACK_OFF, BAND


def heavy(shape, generator):
    """Student's t with two degrees of freedom: no variance."""
    normal, a, b = (torch.randn(shape, generator=generator) for _ in range(3))
    return normal / ((a.square() + b.square()) / 2).sqrt()


def normal(shape, generator):
    return torch.randn(shape, generator=generator)


def run_plant(
    target, *, scale=1.0, layers=6, draw=normal, feedback=0.0, push=0.0, delay=0, sweep=0.0, steps=100, tokens=128
):
    """Sparsities, step by step, of layers that spread differently, see each other's sparsity, and are pushed.

    Also the tracker, and where the thresholds were. With ``sweep``, every 50 steps go through the rows from those with
    the highest logits to those with the lowest, as rows batched by their length may.
    """
    generator = torch.Generator().manual_seed(0)
    tracker, shifts, readings = SparsityTracker(target), [0.0] * (delay + 1), []
    spreads = torch.logspace(-0.7, 0.7, layers) if layers > 1 else torch.ones(1)
    offsets = 0.5 * torch.randn(layers, generator=generator)
    fixed = [draw((32, 32), generator) for _ in range(layers)]

    def margins(draws, common, step):
        found, closed = Margins(layers), 0.0
        for layer in range(layers):
            logits = spreads[layer] * draws[layer] + offsets[layer] + common
            at = scale * (logits - feedback * closed / max(layer, 1) - push * step) - shifts[-1 - delay]
            found.add(layer, Routing(at.sigmoid(), at > 0, at))
            closed += float((at <= 0).float().mean())
        return found

    for step in range(steps):
        ramp, following = (min(1.0, (at + 1) / (0.1 * steps)) for at in (step, step + 1))
        common = 0.03 * float(torch.randn((), generator=generator)) + sweep * (0.5 - step % 50 / 50)
        sparsity = margins([draw((tokens, 32), generator) for _ in range(layers)], common, step).sparsity
        tracker.judge(sparsity, 1.0, ramp, tokens)
        if not tracker.waited:
            tracker.look(margins(fixed, 0, step))
        tracker.pass_step(tokens)
        moved = tracker.move(margins(fixed, 0, step + 1), following) if tracker.is_due else 0.0
        shifts.append(shifts[-1] + moved)
        readings.append(sparsity)
    return readings, tracker, shifts[delay + 1 :]


@pytest.mark.parametrize("target", [0.3, 0.95])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
@pytest.mark.parametrize(
    "plant",
    [
        {},
        {"layers": 1},
        {"layers": 80, "tokens": 32, "steps": 60},
        {"draw": heavy},
        {"feedback": 1.0},
        {"push": 0.3},
        {"delay": 1},
    ],
    ids=["six layers", "one layer", "eighty layers", "heavy tails", "feedback", "push", "delay"],
)
def test_the_sparsity_is_held(target, scale, plant):
    readings, tracker, _ = run_plant(target, scale=scale, **plant)
    count = len(readings)
    assert max(abs(reading - target) for reading in readings[count // 5 :]) < BAND
    assert sum(readings[-count // 10 :]) / (count // 10) == pytest.approx(target, abs=0.01)
    assert tracker.factor == 1


@pytest.mark.parametrize("target", [0.8, 0.95])
def test_a_short_warm_up_ends_in_the_band(target):
    readings, _, _ = run_plant(target, feedback=0.3, steps=40)
    assert max(abs(reading - target) for reading in readings[4:]) < BAND


def test_a_longer_delay_does_not_make_it_swing():
    readings, _, _ = run_plant(0.5, delay=2, steps=200)
    assert max(abs(reading - 0.5) for reading in readings[100:]) < 2 * BAND


def test_rows_batched_by_length_do_not_drag_the_threshold_along():
    readings, _, thresholds = run_plant(0.8, sweep=0.5, steps=600)
    assert max(readings[500:]) - min(readings[500:]) > 0.1
    assert max(thresholds[500:]) - min(thresholds[500:]) < 0.06
    assert sum(readings[500:]) / 100 == pytest.approx(0.8, abs=0.01)


def test_the_target_warms_up_from_where_the_model_starts():
    tracker = SparsityTracker(0.8)
    tracker.judge(0.4, 1.0, 0.0)
    assert [tracker.wanted(ramp) for ramp in (0.0, 0.5, 1.0)] == pytest.approx([0.4, 0.75, 0.8])


def test_the_price_balances_the_push_of_the_other_losses():
    tracker = SparsityTracker(0.5)
    assert tracker.price == 0
    for _ in range(20):
        tracker.feel(push=-6.0 + tracker.price * 2.0, slope=2.0)
        tracker.judge(0.5, 1.0, 1.0)
    assert tracker.price == pytest.approx(3.0)


def test_a_step_outside_the_band_counts_for_less_until_it_recovers():
    tracker = SparsityTracker(0.5)
    assert tracker.judge(0.7, 1.0, 0.5) is None  # the target is not warmed up yet
    assert "its sparsity is 0.600, not 0.500" in tracker.judge(0.6, 1.0, 1.0)
    factors = [tracker.factor]
    for _ in range(4):
        assert tracker.judge(0.52, 1.0, 1.0) is None
        factors.append(tracker.factor)
    assert factors == [BACK_OFF, 0.2, 0.4, 0.8, 1.0]
    assert tracker.strays == 1


def test_the_few_tokens_of_a_small_step_are_no_reason_to_back_off():
    assert SparsityTracker(0.5).judge(0.6, 1.0, 1.0, tokens=100) is None
    assert SparsityTracker(0.5).judge(0.6, 1.0, 1.0, tokens=1000) is not None


def test_a_task_loss_that_jumps_is_noticed_and_one_that_stays_up_is_got_used_to():
    tracker = SparsityTracker(0.5)
    for step in range(20):
        assert tracker.judge(0.5, 3.0 + 0.05 * (step % 2), 1.0) is None
    assert "its task loss jumped from 3.0" in tracker.judge(0.5, 9.0, 1.0)
    verdicts = [tracker.judge(0.5, 9.0, 1.0) for _ in range(30)]
    assert verdicts[-1] is None


def test_trained_on_target_means_over_the_tokens_of_the_last_steps():
    tracker = SparsityTracker(0.5)
    assert not tracker.on_target
    for reading in (0.49, 0.5, 0.53):
        tracker.judge(reading, 1.0, 1.0)
        tracker.keep_last(2.0, 100_000)
    assert tracker.on_target
    assert tracker.trained == pytest.approx(0.5067, abs=1e-3)
    tracker.judge(0.65, 1.0, 1.0)
    tracker.keep_last(4.0, 1000)
    assert tracker.on_target
    tracker.keep_last(4.0, 49_000)
    assert not tracker.on_target
    assert (tracker.first_loss, tracker.last_loss) == (1.0, pytest.approx((2 * 300 + 4 * 50) / 350))
    few = SparsityTracker(0.5, sparsity=0.54)
    few.keep_last(1.0, 1000)
    assert few.on_target
    few.keep_last(1.0, 9000)
    assert not few.on_target


def test_state_is_restored():
    tracker = SparsityTracker(0.5)
    tracker.feel(1.0, 2.0)
    tracker.judge(0.4, 1.0, 1.0)
    again = SparsityTracker(0.5)
    again.restore(tracker.state())
    assert again == tracker
