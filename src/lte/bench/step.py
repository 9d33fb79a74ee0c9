"""What a training step costs: ordinary fine-tuning against training with a target sparsity, in time and memory."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from lte.bench.rows import Row
from lte.methods import LTEConfig
from lte.sparsify import sparsify
from lte.training import LTETrainer, LTETrainingArguments

WARM_STEPS = 2


def bench_step(
    model: Any,
    *,
    batch: int,
    context: int,
    steps: int = 6,
    rounds: int = 4,
    seed: int = 0,
    report: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Time training steps on random tokens, the two kinds in turns so that both see the same machine.

    Args:
        model: a dense causal language model.
        batch: rows per step.
        context: tokens per row.
        steps: that count, per round.
        rounds: of each kind.
        seed: of the tokens.
        report: called with a line for every round.

    Returns:
        A row for ``fine-tuning`` (transformers.Trainer, AdamW) and one for ``lte``: ``model``; median ``ms_per_step``;
        ``mbytes``, the most that parameters, gradients, optimiser state and tensors saved for the backward pass take
        together; and both as ratios to fine-tuning, ``time_ratio`` and ``memory_ratio``.
    """
    generator = torch.Generator().manual_seed(seed)
    count = batch * (steps + WARM_STEPS)
    ids = torch.randint(3, model.config.vocab_size, (count, context), generator=generator).tolist()
    data = Dataset.from_dict({"input_ids": ids, "labels": ids}).with_format("torch")
    calibration = [{"input_ids": data[:batch]["input_ids"], "labels": data[:batch]["labels"]}]
    sparse = sparsify(copy.deepcopy(model), LTEConfig(), calibration=calibration)
    kinds: dict[str, Callable[[TrainingArguments], Trainer]] = {
        "fine-tuning": lambda args: Trainer(model=model, args=args, train_dataset=data),
        "lte": lambda args: LTETrainer(model=sparse, args=args, train_dataset=data),
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    mbytes = dict.fromkeys(kinds, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, rounds + 1):
            report(f"round {number} of {rounds}")
            for kind, make in kinds.items():
                watch = _Watch()
                trainer = make(_arguments(kind, folder, batch, steps + WARM_STEPS))
                trainer.add_callback(watch)
                trainer.remove_callback(PrinterCallback)
                watch.count_saved(trainer)
                trainer.train()
                seconds[kind] += watch.seconds[WARM_STEPS:]
                mbytes[kind] = max(mbytes[kind], (watch.saved_bytes + _state_bytes(trainer)) / 1e6)
    times = {kind: 1e3 * statistics.median(values) for kind, values in seconds.items()}
    return [
        {
            "model": str(model.config.name_or_path),
            "training": kind,
            "batch": batch,
            "context": context,
            "ms_per_step": times[kind],
            "time_ratio": times[kind] / times["fine-tuning"],
            "mbytes": mbytes[kind],
            "memory_ratio": mbytes[kind] / mbytes["fine-tuning"],
        }
        for kind in kinds
    ]


def _arguments(kind: str, folder: str, batch: int, steps: int) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": 1e-6,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**settings) if kind != "lte" else LTETrainingArguments(target_sparsity=0.7, **settings)


class _Watch(TrainerCallback):
    """Time of every step, and bytes of the tensors its forward saves."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.started = 0.0
        self.saved_bytes = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _synchronise()
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _synchronise()
        self.seconds.append(time.perf_counter() - self.started)

    def count_saved(self, trainer: Trainer) -> None:
        """Count in the first step, which is not timed."""
        original = trainer.compute_loss
        parameters = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}

        def counted(*args: Any, **kwargs: Any) -> Any:
            if self.seconds:
                return original(*args, **kwargs)
            found: dict[int, int] = {}

            def keep(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in parameters:
                    found[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = original(*args, **kwargs)
            self.saved_bytes = sum(found.values())
            return loss

        trainer.compute_loss = counted


def _state_bytes(trainer: Trainer) -> int:
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    states = sum(
        value.numel() * value.element_size()
        for state in trainer.optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
    return states + 2 * sum(p.numel() * p.element_size() for p in parameters)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
