"""A training run in a process of its own, so that a test can kill it: ``worker.py OUT STEP_SECONDS [resume]``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from lte.training import last_complete_checkpoint
from tests.training.common import rows, sparse_model, trainer


class Slow(TrainerCallback):
    """Gives the test time to kill between steps, and says where the run is."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_step_end(self, args, state, control, **kwargs) -> None:
        print(f"step {state.global_step}", flush=True)
        time.sleep(self.seconds)


def main(out: Path, seconds: float, resume: bool) -> None:
    torch.set_num_threads(1)
    model = sparse_model("gpt2")  # has dropout, so that the random state matters
    run = trainer(out, model, rows(), stage1_steps=6, stage2_steps=6, save_strategy="steps", save_steps=2, eta=2.0)
    run.add_callback(Slow(seconds))
    last = last_complete_checkpoint(out)
    run.train(resume_from_checkpoint=str(last) if resume and last else None)
    run.model.save_pretrained(out / "final")


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), "resume" in sys.argv)
