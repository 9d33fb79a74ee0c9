"""Predictors that are fitted, before any training, to what the dense model does."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lte.grouping import Activations
from lte.nn import PredictorRouter, largest

EPOCHS, STEPS, BATCH, RATE = 20, 200, 256, 2e-3
"""Passes over the calibration tokens, but at least so many steps; tokens of a step, and learning rate of Adam."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits and targets, [t, E] each -> a scalar."""


def fit_predictor(
    router: PredictorRouter,
    seen: Activations,
    targets: Callable[[Tensor], Tensor],
    loss: Loss,
    generator: torch.Generator,
) -> None:
    """Train a predictor on what its FFN does with the calibration tokens.

    Args:
        router: its weights are drawn anew.
        seen: inputs and activations.
        targets: activations [t, F] -> what the logits should say, [t, E].
        loss: of the logits.
        generator: on the CPU, for the weights and the order of the tokens.
    """
    router.reset_parameters(generator)
    x_TD = seen.inputs_TD.float()
    wanted_TE = torch.cat([targets(hidden_tF) for _, (_, hidden_tF) in seen.chunks()])
    router.reduce.data /= x_TD.square().mean().sqrt().clamp_min(1e-12)
    router.requires_grad_(True)
    of_a_pass = -(-len(x_TD) // BATCH)
    passes = max(EPOCHS, -(-STEPS // of_a_pass))
    optimizer = torch.optim.Adam(router.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=passes * of_a_pass)
    with torch.enable_grad():
        for _ in range(passes):
            for rows in torch.randperm(len(x_TD), generator=generator).to(x_TD.device).split(BATCH):
                value = loss(router.scores(x_TD[rows]), wanted_TE[rows].float())
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                schedule.step()
    optimizer.zero_grad()
    router.freeze()


def largest_of_banks(k: int, bank: int) -> Callable[[Tensor], Tensor]:
    """Targets: which of every bank of neurons are the k with the largest activations; [t, F] -> [t, F] bool."""

    def targets(hidden_tF: Tensor) -> Tensor:
        return largest(hidden_tF.abs().unflatten(-1, (-1, bank)), k).flatten(-2)

    return targets
