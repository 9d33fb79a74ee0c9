"""SIGTERM, which clusters send before they kill: finish the step, save a checkpoint, stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback


class Terminated(BaseException):
    """SIGTERM came; like KeyboardInterrupt, no error of anybody's.

    Attributes:
        checkpoint: the folder of checkpoints that one was saved in; None where nothing was being trained.
    """

    def __init__(self, checkpoint: str | None = None) -> None:
        super().__init__(checkpoint)
        self.checkpoint = checkpoint


class StopAtSignal(TrainerCallback):
    """Saves a checkpoint at the end of the step in which SIGTERM came, and raises :class:`Terminated` once it is whole.

    Of several processes all stop after the same step.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen; only a main thread can."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop, if any process was asked to."""
        if self._any(args.device):
            self.asked = control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen no longer."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        if self.asked:
            raise Terminated(args.output_dir)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True

    def _any(self, device: torch.device) -> bool:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.asked
        asked = torch.tensor(float(self.asked), device=device)
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        return bool(asked)


@contextmanager
def termination() -> Iterator[None]:
    """Inside, SIGTERM raises :class:`Terminated` where nothing else answers it."""

    def stop(number: int, frame: Any) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
