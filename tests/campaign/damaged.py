"""Damaged checkpoints: a CheckpointError, and never a model that is dense, or of other numbers, in silence.

python -m tests.campaign.damaged [--json FILE] [PATTERN]    # about 5 minutes for all
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lte
from lte.errors import LTEError
from lte.nn import sparse_ffns
from tests import models
from tests.test_planes import wide

Damage = Callable[[Path], None]
VALUES: list[Any] = [None, -1, 0, 1.5, 1e99, "x", "", [], {}, True, [1, 2], {"a": 1}]


def build(root: Path) -> dict[str, Path]:
    """Checkpoints of every kind there is."""
    text = [models.inputs(8, 16)]
    of = lte.LTEConfig(expert_size=8, grouping="random", router_init="random")
    made = {
        "routers": lte.sparsify(models.build("llama"), of),
        "self-prediction": lte.sparsify(wide(), lte.SelfPredictionConfig(), calibration=text),
        "int4": lte.quantize(models.build("llama"), bits=4),
        "planes": lte.quantize(wide(), bits=4, bits_per_token=3.2, calibration=text),
    }
    for name, model in made.items():
        if name != "int4":
            lte.calibrate(model, text, 0.4) if name != "planes" else None
        model.save_pretrained(root / name)
    return {name: root / name for name in made}


def of_config(path: Path) -> Iterator[tuple[str, Damage]]:
    """Every key of config.json, and of the entry in it, with values that are not its own, or gone."""
    config = json.loads((path / "config.json").read_text())

    def change(keys: tuple[str, ...], value: Any, *, gone: bool = False) -> Damage:
        def damage(folder: Path) -> None:
            file = folder / "config.json"
            found = json.loads(file.read_text())
            section = found
            for key in keys[:-1]:
                section = section[key]
            if gone:
                del section[keys[-1]]
            else:
                section[keys[-1]] = value
            file.write_text(json.dumps(found))

        return damage

    def walk(section: dict[str, Any], keys: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for key, value in section.items():
            yield (*keys, key)
            if isinstance(value, dict):
                yield from walk(value, (*keys, key))

    shape = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "architectures",
    )
    for keys in walk(config, ()):
        if keys[0] == "quantization_config" or keys[0] in shape or keys[0] == "model_type":
            name = ".".join(keys)
            yield f"config {name} gone", change(keys, None, gone=True)
            for value in VALUES:
                yield f"config {name}={value!r}", change(keys, value)


def of_weights(path: Path) -> Iterator[tuple[str, Damage]]:
    """Tensors that are gone, renamed, of another shape or dtype, or hold what they should not."""
    tensors = load_file(path / "model.safetensors")

    def change(name: str, make: Callable[[torch.Tensor], torch.Tensor | None], rename: str = "") -> Damage:
        def damage(folder: Path) -> None:
            file = folder / "model.safetensors"
            found = load_file(file)
            made = make(found.pop(name))
            if made is not None:
                found[rename or name] = made.contiguous()
            save_file(found, file, metadata={"format": "pt"})

        return damage

    def first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
        def make(tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.clone()
            tensor.view(-1)[:1] = value
            return tensor

        return make

    for name, tensor in tensors.items():
        if "layers.1" in name:
            continue
        yield f"weights {name} gone", change(name, lambda tensor: None)
        yield f"weights {name} renamed", change(name, lambda tensor: tensor, rename=name + "_")
        yield (
            f"weights {name} shorter",
            change(name, lambda tensor: tensor[:-1] if tensor.ndim and len(tensor) > 1 else None),
        )
        yield (
            f"weights {name} longer",
            change(name, lambda tensor: torch.cat([tensor, tensor]) if tensor.ndim else None),
        )
        yield f"weights {name} flat", change(name, lambda tensor: tensor.reshape(-1, 1))
        if tensor.is_floating_point():
            yield f"weights {name} nan", change(name, first(float("nan")))
            yield f"weights {name} inf", change(name, first(float("inf")))
            yield f"weights {name} int32", change(name, lambda tensor: tensor.to(torch.int32))
        else:
            yield f"weights {name} float", change(name, lambda tensor: tensor.float())


def of_bytes(path: Path) -> Iterator[tuple[str, Damage]]:
    """Files cut short, overwritten, empty, gone."""
    size = (path / "model.safetensors").stat().st_size
    chance = random.Random(0)

    def cut(name: str, keep: int) -> Damage:
        return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep]) and None

    def overwrite(name: str, at: int, count: int) -> Damage:
        def damage(folder: Path) -> None:
            content = bytearray((folder / name).read_bytes())
            content[at : at + count] = b"\xff" * len(content[at : at + count])
            (folder / name).write_bytes(content)

        return damage

    for keep in (0, 1, 7, 8, 9, 100, *(chance.randrange(size) for _ in range(8)), size - 1):
        yield f"bytes cut at {keep}", cut("model.safetensors", keep)
    for at in (0, 4, 8, 20, 60, 200):
        yield f"bytes header overwritten at {at}", overwrite("model.safetensors", at, 4)
    for keep in (0, 1, 20, 200):
        yield f"bytes config cut at {keep}", cut("config.json", keep)
        yield f"bytes config overwritten at {keep}", overwrite("config.json", keep, 3)
    for name in ("model.safetensors", "config.json"):
        yield f"bytes {name} gone", lambda folder, name=name: (folder / name).unlink()


def cases(folders: dict[str, Path]) -> Iterator[tuple[str, Path, Damage]]:
    """Name, checkpoint and damage of every case."""
    for kind, path in folders.items():
        for made in (of_config(path), of_weights(path), of_bytes(path)):
            for name, damage in made:
                yield f"{kind} {name}", path, damage


def outcome(path: Path, load: Callable[..., Any], wanted: torch.Tensor) -> tuple[str, str]:
    """``refused``, ``same`` (logits as before), ``other``, ``dense`` or ``exception``."""
    try:
        model = load(path)
    except LTEError as error:
        return "refused", str(error)
    except Exception as error:  # noqa: BLE001 - what a campaign is for
        # Of what transformers does with a folder before it comes to us, all that counts is that it does not go on.
        return ("exception" if load is lte.load else "refused"), f"{type(error).__name__}: {error}"
    if not sparse_ffns(model):
        return "dense", ""
    try:
        with torch.no_grad():
            found = model.eval()(models.inputs(1, 6)["input_ids"]).logits
    except Exception as error:  # noqa: BLE001
        return "exception", f"after loading: {type(error).__name__}: {error}"
    same = found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-5)
    return ("same", "") if same else ("other", "")


def main() -> None:
    """Run the cases, print those that went wrong, write the counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("pattern", nargs="?", default="")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="lte-damaged-"))
    folders = build(root)
    with torch.no_grad():
        wanted = {path: lte.load(path)(models.inputs(1, 6)["input_ids"]).logits for path in folders.values()}
    counts, wrong = Counter[str](), list[str]()
    for name, path, damage in cases(folders):
        if given.pattern not in name:
            continue
        for label, load in (("lte.load", lte.load), ("AutoModel", AutoModelForCausalLM.from_pretrained)):
            shutil.rmtree(root / "copy", ignore_errors=True)
            shutil.copytree(path, root / "copy")
            damage(root / "copy")
            kind, said = outcome(root / "copy", load, wanted[path])
            counts[f"{label} {kind}"] += 1
            if kind not in ("refused", "same"):
                wrong.append(f"{kind} {label} {name}: {' '.join(said.split())[:200]}")
                print(wrong[-1], flush=True)
    print(dict(counts), file=sys.stderr)
    if given.json:
        given.json.write_text(json.dumps({"counts": dict(counts), "wrong": wrong}, indent=2) + "\n")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
