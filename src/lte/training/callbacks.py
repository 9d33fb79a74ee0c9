"""What a person sees of a run: a progress bar with the time left, and a log line per step on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

SHOWN = {"stage": "stage", "task_loss": "task", "loss": "loss", "sparsity": "sparsity", "learning_rate": "lr"}
"""Logged values shown beside the bar -> their short names."""


class StepProgress(TrainerCallback):
    """One bar over the whole run, with the time left and the latest losses and sparsity beside it."""

    def __init__(self, description: str = "training") -> None:
        self.description = description
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar at the step a resumed run starts from."""
        if state.is_world_process_zero and not args.disable_tqdm:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self.description,
                unit="step",
                dynamic_ncols=True,
                mininterval=1.0,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the latest values."""
        if self.bar is not None and logs:
            shown = {short: f"{logs[key]:.4g}" for key, short in SHOWN.items() if key in logs}
            self.bar.set_postfix(shown, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class JsonLinesLog(TrainerCallback):
    """Every logged record as one JSON line; a resumed run first writes again what its checkpoint knew.

    Args:
        path: the file; its folder must exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the file from the history of the run so far."""
        if state.is_world_process_zero:
            self.path.write_text("".join(json.dumps(record) + "\n" for record in state.log_history))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Append the newest record."""
        if state.is_world_process_zero and state.log_history:
            with self.path.open("a") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")
