"""Saving and loading: a stock checkpoint plus routers, and no way to take a dense model for a sparse one.

Importing this module registers the method with transformers, so that ``AutoModel*.from_pretrained`` restores the
sparse model. ``model.save_pretrained`` needs nothing from here: routers and their thresholds are in the state dict, and
the settings are the ``quantization_config`` entry of ``config.json``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer

from lte import gguf
from lte.config import QUANT_METHOD, SparsityConfig
from lte.errors import CheckpointError, ConfigError, LTEError
from lte.memory import is_shortage
from lte.nn import QuantizedWeight, Router, SparseFFN, read_thresholds, sparse_ffns
from lte.quantization import install_quantized
from lte.sparsify import install_sparse_ffns
from lte.thresholds import check_points, enable_dial

_HUB_KEYS = ("revision", "token", "cache_dir")
"""Keywords of ``from_pretrained`` that say which checkpoint of the hub is meant."""

_Errors = tuple[type[Exception], ...]
_BROKEN: _Errors = (Exception,)
"""What transformers raises on a checkpoint that is broken or not what it should be: its configs check numbers with
whatever errors these give, readers of GGUF check little, and tokenizers raises nothing narrower."""

register_quantization_config(QUANT_METHOD)(SparsityConfig)


@register_quantizer(QUANT_METHOD)
class SparseModelLoader(HfQuantizer):
    """What transformers calls while it loads a sparse checkpoint.

    After loading the model is an ordinary one: the quantizer is taken off again, so that training, casting and
    saving are not restricted as they are for quantized models.
    """

    quantization_config: SparsityConfig

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        shards = getattr(model.config, "distributed_config", None)
        if getattr(shards, "tp_plan", None) is not None or (getattr(shards, "tp_size", None) or 1) > 1:
            raise CheckpointError(
                "a sparse model cannot be loaded with tensor parallelism (tp_plan, tp_size): masks of the whole FFN "
                "would meet parts of it. Load it whole, or with device_map"
            )
        install_sparse_ffns(model, self.quantization_config.method)
        try:
            check_points(model, self.quantization_config)
            if self.quantization_config.weights is not None:
                install_quantized(model, self.quantization_config.weights)
        except ConfigError as error:
            raise CheckpointError(f"config.json: quantization_config: {error}") from None
        enable_dial(model)
        # Whatever dtype is asked for, and also where a checkpoint holds routers of another one.
        model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), ".router."}
        if checkpoint_files is not None:
            _check_files(model, checkpoint_files)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        del model.hf_quantizer
        del model.quantization_method
        model.is_quantized = False
        _check_numbers(model)
        for ffn in sparse_ffns(model):
            ffn.router.freeze()
        for module in model.modules():
            if isinstance(module, transformers.PreTrainedModel):
                module.config.__dict__.pop("_is_quantized", None)
        return model

    def is_serializable(self) -> bool:
        """Saving is the stock saving."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Training is the stock training."""
        return True


def load(path: str | Path, **kwargs: Any) -> Any:
    """Load a sparse model, in hard mode, or raise: never a dense one.

    Args:
        path: folder or hub id of a model saved with ``save_pretrained`` after :func:`lte.sparsify`.
        **kwargs: handed to ``from_pretrained`` (``dtype``, ``device_map``, ``revision``, ...).

    Raises:
        CheckpointError: the checkpoint is missing, dense, truncated, edited or of another version.
    """
    config = read_config(path, **{k: kwargs[k] for k in _HUB_KEYS if k in kwargs})
    if not is_sparse_config(config):
        raise CheckpointError(
            f"{path} is a dense checkpoint: its config.json has no quantization_config of lte; "
            "make it sparse with lte.sparsify or `lte train`"
        )
    named = config.architectures
    architecture = named[0] if isinstance(named, list) and named else None
    model_class = getattr(transformers, str(architecture), None)
    if model_class is None:
        raise CheckpointError(
            f"{path}/config.json names architectures={config.architectures}, which transformers lacks"
        )
    model = load_weights(model_class, path, **kwargs)
    require_sparse(model)
    return model


def load_dense(path: str | Path, auto_class: Any = AutoModelForCausalLM, **kwargs: Any) -> Any:
    """Load a dense model as a plain one, which trains, saves and can be made sparse.

    Args:
        path: a folder, a hub id, or a ``.gguf`` file, here or as ``owner/repo/file.gguf``. The weights of a GGUF file
            are unpacked to ``dtype``, float32 unless said otherwise.
        auto_class: the transformers class that picks the model's class.
        **kwargs: ``new_head`` of :func:`load_weights`; the rest is handed to ``from_pretrained`` (``dtype``,
            ``device_map``, ``revision``, ...).

    Raises:
        CheckpointError: the checkpoint is missing, sparse, truncated, or of a kind transformers cannot read.
    """
    if not gguf.split_path(path):  # reading the header of one takes seconds, and it is never sparse
        config = read_config(path, **{k: kwargs[k] for k in _HUB_KEYS if k in kwargs})
        if is_sparse_config(config):
            raise CheckpointError(f"{path} is a sparse checkpoint; load it with lte.load")
    return load_weights(auto_class, path, **kwargs)


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a model folder, hub id or ``.gguf`` file."""
    if gguf.split_path(path):
        gguf.check_file(path)
    where, options = gguf.reading_options(path)
    try:
        return AutoTokenizer.from_pretrained(where, **options)
    except _BROKEN as error:
        raise CheckpointError(f"no tokenizer could be loaded from {str(path)!r}: {_first_line(error)}") from error


def load_weights(model_class: Any, path: str | Path, *, new_head: bool = False, **kwargs: Any) -> Any:
    """``model_class.from_pretrained(path)`` with every weight present, and file errors told as CheckpointError.

    transformers fills what a checkpoint lacks with random values; here that is allowed only for a task head, and
    only with ``new_head``. What comes out of a ``.gguf`` file is made a plain model.
    """
    where, options = gguf.reading_options(path)
    if options:
        gguf.check_file(path)
        options |= gguf.unpacked()
    try:
        model, info = model_class.from_pretrained(where, output_loading_info=True, **options, **kwargs)
    except LTEError:
        raise
    except _BROKEN as error:
        if is_shortage(error):
            raise LTEError(f"{path}: not enough memory to load it; try dtype=bfloat16, or device_map") from error
        raise CheckpointError(f"{path}: the checkpoint cannot be read: {_first_line(error)}") from error
    heads = ("classifier.", "score.", "pooler.") if new_head else ()
    missing = [
        key for key in info["missing_keys"] if not key.removeprefix(model.base_model_prefix + ".").startswith(heads)
    ]
    if missing:
        raise CheckpointError(f"{path}: the checkpoint lacks {_some(missing)}, which {type(model).__name__} needs")
    if options:
        gguf.make_plain(model, path)
    if not sparse_ffns(model):  # the numbers of sparse ones were looked at while they were loaded
        _check_numbers(model)
    return model


def read_config(path: str | Path, **kwargs: Any) -> Any:
    """The transformers config of a folder or hub id; CheckpointError where there is none."""
    if gguf.split_path(path):
        return _read_gguf_config(path, **kwargs)
    local = Path(path)
    if _names_a_folder(str(path)) and not local.is_dir():
        raise CheckpointError(f"no model folder {str(path)!r}; give a folder with a config.json, or a hub id")
    if local.is_dir() and not (local / "config.json").is_file():
        raise CheckpointError(f"{path} holds no config.json; is it a model folder?")
    try:
        return AutoConfig.from_pretrained(path, **kwargs)
    except LTEError:
        raise
    except _BROKEN as error:
        if local.is_dir():
            raise CheckpointError(f"{path}/config.json cannot be read: {_first_line(error)}") from error
        raise CheckpointError(f"{str(path)!r} is neither a folder here nor to be had from the hub") from error


def _read_gguf_config(path: str | Path, **kwargs: Any) -> Any:
    gguf.check_file(path)
    where, options = gguf.reading_options(path)
    try:
        return AutoConfig.from_pretrained(where, **options, **kwargs)
    except _BROKEN as error:
        if "is not supported" in str(error):
            raise CheckpointError(f"{path}: {_first_line(error)} Give a model folder or hub id instead") from error
        if Path(path).is_file():
            raise CheckpointError(
                f"{path} cannot be read as a model (is the file whole?): {_first_line(error)}"
            ) from error
        raise CheckpointError(f"{str(path)!r} is neither a file here nor to be had from the hub") from error


def save_thresholds(path: Path, model: Any) -> None:
    """Write where a model's thresholds stand into the files of its weights, from which it was loaded.

    Every file is copied, changed, and put in the place of the old one once all are whole, so there must be room for
    them twice; until then, whatever is raised, they are as before.
    """
    prefix = model.base_model_prefix + "."
    states = {
        f"{name}._extra_state".removeprefix(prefix): module.get_extra_state()
        for name, module in model.named_modules()
        if isinstance(module, Router)
    }
    changed: dict[Path, Path] = {}
    try:
        for file in _weight_files(path):
            places = {key.removeprefix(prefix): place for key, place in _places(file).items()}
            if not states.keys() & places.keys():
                continue
            changed[file] = file.with_name(f"{file.name}.{os.getpid()}.partial")
            shutil.copy(file, changed[file])
            with changed[file].open("r+b") as out:
                for key in states.keys() & places.keys():
                    out.seek(places[key])
                    out.write(states.pop(key).numpy().astype("<i8").tobytes())
        if states:
            raise CheckpointError(f"{path} holds no weights with {_some(states)}, which the model has")
        for file, partial in changed.items():
            os.replace(partial, file)
    finally:
        for partial in changed.values():
            partial.unlink(missing_ok=True)


def _weight_files(path: Path) -> list[Path]:
    """Those that are loaded: others may lie beside them."""
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if whole.is_file() or not index.is_file():
        return [whole] if whole.is_file() else []
    return sorted({path / name for name in json.loads(index.read_text())["weight_map"].values()})


def _places(file: Path) -> dict[str, int]:
    """Where in a safetensors file each tensor begins."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    return {key: 8 + length + entry["data_offsets"][0] for key, entry in header.items() if key != "__metadata__"}


def _check_numbers(model: nn.Module) -> None:
    """CheckpointError where a weight is a NaN or infinite; at the speed memory can be read."""
    for name, tensor in model.state_dict().items():
        if tensor.dtype == torch.int16:  # as modules of few bits keep numbers of bfloat16
            tensor = tensor.view(torch.bfloat16)
        if tensor.is_floating_point() and not tensor.is_meta and not torch.isfinite(tensor.sum(dtype=torch.float32)):
            wrong = int((~torch.isfinite(tensor)).sum())
            if wrong:
                raise CheckpointError(f"{name} has {wrong} of {tensor.numel()} numbers that are NaN or infinite")


def _names_a_folder(path: str) -> bool:
    """Whether a name is meant as a path: no hub id, which is ``name`` or ``owner/name``, could be meant."""
    if path.startswith((".", "~", "/")) or path.count("/") > 1:
        return True
    owner, slash, _ = path.partition("/")
    return bool(slash) and Path(owner).is_dir()


def is_sparse_config(config: Any) -> bool:
    """Whether a transformers config describes a model made sparse by this package."""
    entry = getattr(config, "quantization_config", None)
    if isinstance(entry, dict):
        return entry.get("quant_method") == QUANT_METHOD
    return isinstance(entry, SparsityConfig)


def default_device() -> torch.device:
    """The accelerator, where there is one, else the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None else found


def device_name(device: torch.device) -> str:
    """What a result was made on: the GPU's name, else the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def require_sparse(model: nn.Module) -> None:
    """Raise CheckpointError unless the model's FFNs run sparse. Call it before evaluating or timing a model."""
    ffns = sparse_ffns(model)
    if not ffns:
        raise CheckpointError(
            f"{type(model).__name__} is dense: it has no sparse FFN; load it with lte.load, or `import lte` before "
            "from_pretrained"
        )
    not_hard = {str(ffn.mode) for ffn in ffns if ffn.mode != "hard"}
    if not_hard:
        raise CheckpointError(f"the model runs in {', '.join(not_hard)} mode; call lte.set_mode(model, 'hard') first")


def _check_files(model: Any, checkpoint_files: Iterable[str]) -> None:
    """Compare the routers and FFN weights the model expects with those in the files, before anything is read.

    transformers fills what a checkpoint lacks with random values and a warning; here it is an error.
    """
    shapes: dict[str, list[int]] = {}
    prefix = model.base_model_prefix + "."
    floating = {name.removeprefix(prefix): value.is_floating_point() for name, value in model.state_dict().items()}
    for file in checkpoint_files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 - a safetensors file is not a mapping
                    stored = tensors.get_slice(key)
                    shapes[key.removeprefix(prefix)] = stored.get_shape()
                    if floating.get(key.removeprefix(prefix)) is (stored.get_dtype()[0] not in "FB"):
                        raise CheckpointError(f"{file}: {key} is stored as {stored.get_dtype()}, which it cannot be")
                    if ".router." in key:
                        _check_router(file, key, tensors.get_tensor(key))
        except SafetensorError as error:
            raise CheckpointError(f"{file}: truncated or not a safetensors file ({_first_line(error)})") from error
    expected = {
        f"{name}.{parameter}".removeprefix(prefix): list(value.shape)
        for name, module in model.named_modules()
        if isinstance(module, SparseFFN | QuantizedWeight)
        for parameter, value in module.state_dict().items()
    }
    leftover = sorted(key for key in set(shapes) - set(expected) if ".router." in key or key.endswith(".codes"))
    if leftover:
        what = "routers" if ".router." in leftover[0] else "weights of few bits"
        raise CheckpointError(f"the checkpoint holds {what} that config.json has no layers for: {_some(leftover)}")
    missing = sorted(set(expected) - set(shapes))
    if missing:
        what = "routers" if all(".router." in key for key in missing) else "FFN weights"
        raise CheckpointError(f"the checkpoint lacks {what}: {_some(missing)}; it was edited or saved without lte")
    for key, shape in expected.items():
        if shapes[key] != shape:
            raise CheckpointError(
                f"the checkpoint's {key} has shape {shapes[key]}, but config.json (expert_size and widths) asks for "
                f"{shape}; one of the two was edited"
            )


def _check_router(file: str, key: str, stored: Tensor) -> None:
    if not torch.isfinite(stored).all():
        raise CheckpointError(f"{file}: {key} holds values that are not finite")
    if key.endswith("._extra_state"):
        try:
            read_thresholds(stored)
        except CheckpointError as error:
            raise CheckpointError(f"{file}: {key}: {error}") from None


def _some(keys: Iterable[str]) -> str:
    names = sorted(keys)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
