"""What a person sees of a run: a progress bar with the time left, and a log line per step on disk."""

from __future__ import annotations

import json
import logging
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from lte.config import FORMAT_VERSION
from lte.errors import CheckpointError, NonFiniteLossError

logger = logging.getLogger(__name__)

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


class FiniteGradients(TrainerCallback):
    """Stops a dense run before a NaN or an infinity reaches its weights; the last checkpoint is kept."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Look at the gradients of the step."""
        norm = gradient_norm(model)
        if not args.fp16 and not torch.isfinite(norm):
            last = last_complete_checkpoint(args.output_dir)
            kept = f"the last good checkpoint is {last}" if last else "no checkpoint had been saved yet"
            raise NonFiniteLossError(
                f"training stopped at step {state.global_step + 1}: the gradient norm is {float(norm)}; {kept}. "
                "Lower learning_rate"
            )


def gradient_norm(model: nn.Module) -> Tensor:
    """Norm over all gradients there are."""
    return get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def restore_finished(trainer: Trainer, checkpoint: str | bool | None, total: int | None = None) -> bool:
    """Load a checkpoint behind which no step is left; transformers would take one more step from it.

    Args:
        trainer: of the model.
        checkpoint: its folder; nothing is done where there is none.
        total: steps there are; None for as many as the run had that left the checkpoint.

    Returns:
        Whether it is one.
    """
    if not checkpoint:
        return False
    state = TrainerState.load_from_json(str(Path(str(checkpoint)) / TRAINER_STATE_NAME))
    if state.global_step < (state.max_steps if total is None else total):
        return False
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = state
    return True


def check_checkpoint(checkpoint: str | Path) -> None:
    """CheckpointError where a run cannot go on from it as if it had not been interrupted.

    Transformers would begin with a new optimizer where that is gone, and with the thresholds it has where another
    version of this package saved the model.
    """
    folder = Path(checkpoint)
    try:
        config = json.loads((folder / "config.json").read_text())
        entry = config.get("quantization_config")
        weights = list(folder.glob("*.safetensors"))
        for file in weights:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
    except (OSError, ValueError, RecursionError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be gone on from: {error}; {AWAY}") from error
    if isinstance(entry, dict) and entry.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} is of format {entry.get('format_version')}, and this version of lte goes on from "
            f"{FORMAT_VERSION}; end that run with lte {entry.get('lte_version', 'as it was')}, or begin anew"
        )
    if any(next(folder.glob(pattern), None) for pattern in SHARDED):  # FSDP and DeepSpeed look themselves
        return
    for pattern in NEEDED:
        files = list(folder.glob(pattern))
        broken = [file.name for file in files if not zipfile.is_zipfile(file)]
        if not files or broken:
            said = f"{broken[0]} cannot be read" if broken else f"it has no {pattern.replace('*', '')}"
            raise CheckpointError(f"{folder} cannot be gone on from: {said}; {AWAY}")


NEEDED = ("optimizer.pt", "scheduler.pt", "rng_state*.pth")
SHARDED = ("optimizer_*", "global_step*", "pytorch_model_fsdp*")
AWAY = "take it away and --resume goes on from the one before, or begin anew with --overwrite"


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The newest ``checkpoint-N`` whose saving was not cut short: its trainer state, written last, can be read."""
    found = sorted(
        (path for path in Path(folder).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()),
        key=lambda path: int(path.name.removeprefix("checkpoint-")),
        reverse=True,
    )
    for path in found:
        try:
            state = json.loads((path / "trainer_state.json").read_text())
        except (OSError, ValueError, RecursionError):
            state = None
        if isinstance(state, dict) and state.get("global_step") == int(path.name.removeprefix("checkpoint-")):
            return path
        logger.warning("%s is incomplete and is passed over", path)
    return None
