"""One process of a distributed run, started by torchrun: ``ddp_worker.py OUT``; rank 0 saves the weights."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.training.common import rows, sparse_model, trainer


def main(out: Path) -> None:
    torch.set_num_threads(1)
    settings = {"per_device_train_batch_size": 2, "ddp_backend": "gloo", "ddp_find_unused_parameters": False}
    run = trainer(out, sparse_model(), rows(padded=True), eta=2.0, **settings)
    run.train()
    if run.is_world_process_zero():
        run.model.save_pretrained(out / "final")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
