"""Models in GGUF files: naming one, and making what transformers reads from it a plain model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import transformers

from lte.errors import CheckpointError, LTEError

SUFFIX = ".gguf"


def split_path(path: str | Path) -> tuple[str, str] | None:
    """(folder or hub id, file name) of a ``.gguf`` file; None for a name that is of none.

    On the hub it is ``owner/repo/file.gguf``, the file at whatever depth. What exists on disk is not looked for there.
    """
    text = str(path)
    if not text.lower().endswith(SUFFIX) or Path(text).is_dir():
        return None
    parts = text.split("/")
    on_hub = len(parts) > 2 and parts[0] not in ("", ".", "..", "~") and not Path(parts[0]).exists()
    if on_hub and not Path(text).exists():
        return "/".join(parts[:2]), "/".join(parts[2:])
    return str(Path(text).parent), Path(text).name


def check_file(path: str | Path) -> None:
    """LTEError where a ``.gguf`` file cannot be read at all: no package for it, no such file, or not one."""
    parent, name = split_path(path) or ("", "")
    if importlib.util.find_spec("gguf") is None:
        raise LTEError(
            f"{path}: reading a .gguf file needs the package gguf; pip install 'learn-to-be-efficient[gguf]'"
        )
    file = Path(parent, name)
    if not Path(parent).is_dir():
        if _is_hub_id(path, parent):
            return
        raise CheckpointError(f"no file {str(path)!r}; give a .gguf file, a model folder, or owner/repo/file.gguf")
    if not file.is_file():
        near = sorted(found.name for found in Path(parent).glob("*.gguf"))
        hint = f"; its folder has {', '.join(near[:3])}" if near else "; there is no .gguf file in its folder"
        raise CheckpointError(f"no file {str(path)!r}{hint}")
    with file.open("rb") as head:
        if head.read(4) != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")


def reading_options(path: str | Path) -> tuple[str, dict[str, Any]]:
    """What ``from_pretrained`` wants of a path: where to look, and ``gguf_file`` where it names one."""
    parts = split_path(path)
    return (str(path), {}) if parts is None else (parts[0], {"gguf_file": parts[1]})


def unpacked() -> dict[str, Any]:
    """Keywords of ``from_pretrained`` that ask for weights as numbers, where the file's blocks might be kept."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def make_plain(model: Any, path: str | Path) -> None:
    """Take off, in place, what marks a model read from a GGUF file as quantised.

    Its weights are numbers already, but transformers calls it quantised and refuses to save or to train it.
    """
    packed = [name for name, parameter in model.named_parameters() if not parameter.dtype.is_floating_point]
    if packed:
        raise CheckpointError(f"{path}: {packed[0]} was not unpacked; convert the file to F16, or give a model folder")
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    model.is_quantized = False
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel):
            for entry in ("quantization_config", "_is_quantized", "_pre_quantization_dtype"):
                module.config.__dict__.pop(entry, None)
    for parameter in model.parameters():
        # Loading a quantised model may freeze it.
        parameter.requires_grad_(True)
    # The header's title of the model, not a place it could be had from.
    model.config.__dict__.pop("_model_name_or_path", None)
    model.config.name_or_path = model.name_or_path = str(path)


def _is_hub_id(path: str | Path, parent: str) -> bool:
    is_local = str(path).startswith((".", "~", "/")) or Path(parent.split("/")[0]).exists()
    return parent.count("/") == 1 and not is_local
