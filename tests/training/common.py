"""A tiny sparse model, rows for it, and a trainer over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

import lte
from tests import models


def rows(n: int = 24, length: int = 12, *, padded: bool = False, seed: int = 5) -> Dataset:
    """Token rows with labels; padded ones have every third row cut to a third of the length."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, models.VOCAB, (n, length), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    if padded:
        mask[::3, length // 3 :] = 0
        labels[mask == 0] = -100
    return Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": mask.tolist(), "labels": labels.tolist()}
    ).with_format("torch")


def collate(batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack rows of one length."""
    return {key: torch.stack([row[key] for row in batch]) for key in batch[0]}


def sparse_model(name: str = "llama", **config: Any) -> Any:
    """A sparsified random model."""
    settings = {"expert_size": models.EXPERT, "grouping": "random", "router_init": "random", "router_init_std": 1.0}
    return lte.sparsify(models.build(name), lte.LTEConfig(**{**settings, **config}))


def self_predicted(name: str = "llama", **config: Any) -> Any:
    """The same of single neurons that a copy of the FFN picks."""
    batch = models.inputs(8, 16)
    calibration = [{**batch, "labels": batch["input_ids"]}]
    return lte.sparsify(models.build(name), lte.SelfPredictionConfig(group=32, **config), calibration=calibration)


def trainer(folder: Path, model: Any = None, data: Dataset | None = None, **settings: Any) -> lte.LTETrainer:
    """A trainer of 3 + 3 steps unless told otherwise, without checkpoints, bars or shuffling surprises."""
    defaults = {
        "output_dir": str(folder),
        **({"max_steps": 6} if settings.get("stages") == 1 else {"stages": 2, "stage1_steps": 3, "stage2_steps": 3}),
        **({} if "target_sparsity" in settings else {"eta": 1.0}),
        "lambda_sep": 0.5,
        "router_learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 1,
    }
    args = lte.LTETrainingArguments(**{**defaults, **settings})
    return lte.LTETrainer(
        model=sparse_model() if model is None else model,
        args=args,
        train_dataset=rows() if data is None else data,
        data_collator=collate,
    )
