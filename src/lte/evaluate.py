"""Quality, achieved sparsity and FLOPs of one model on one task, always together."""

from __future__ import annotations

from typing import Any

from lte.accounting import ModelCost, model_cost
from lte.errors import CheckpointError, ConfigError
from lte.hub import default_device, is_sparse_config, load, load_dense, load_tokenizer, read_config, require_sparse
from lte.nn import SparsityMeter, observe_routing, sparse_ffns
from lte.tasks import Progress, Task
from lte.versions import versions


def evaluate(
    model: Any,
    tokenizer: Any,
    task: Task,
    source: str,
    *,
    dense: bool = False,
    batch_size: int = 8,
    seed: int = 0,
    bins: int = 0,
    against: Any | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate a model and account for what it used.

    Args:
        model: a sparse model in hard mode, or a dense one with ``dense=True``.
        tokenizer: of the model.
        task: data and metric.
        source: the evaluation data.
        dense: evaluate the dense baseline under the same accounting.
        batch_size: does not change the result.
        seed: recorded, and set before evaluating.
        bins: of a histogram of every layer's scores over (0, 1), added as ``score_histogram``; 0 for none.
        against: another model, the one of 16 bits for instance, whose predictions these are compared with:
            ``kl_divergence`` (nats a token) and ``same_top`` (share of tokens) among the ``extras``.
        progress: called with batches done and in all.

    Returns:
        ``metric``, ``value``, ``sparsity``, ``sparsity_per_layer``, ``linear_sparsity`` (of all linear layers of the
        blocks, as some papers count), ``gflops_per_token`` and ``bytes_per_token``
        (``dense``, ``sparse``, ``router``), ``tokens``, ``model``, ``task``, ``data``, ``seed``, ``versions``; also
        ``extras`` (further numbers of the task) and ``samples``.

    Raises:
        CheckpointError: the model is dense and ``dense`` was not asked for, or the reverse.
    """
    cost = model_cost(model)
    meter = SparsityMeter(len(sparse_ffns(model)), bins)
    if dense:
        if sparse_ffns(model):
            raise CheckpointError("the model is sparse; evaluate it without --dense")
    else:
        require_sparse(model)
    with observe_routing(model, meter):
        result = task.evaluate(
            model,
            tokenizer,
            source,
            batch_size=batch_size,
            set_token_mask=meter.set_token_mask,
            progress=progress,
            seed=seed,
            against=against,
        )
    return {
        "metric": result.metric,
        "value": result.value,
        **accounting(cost, None if dense else meter),
        "tokens": result.tokens,
        "model": str(getattr(model.config, "name_or_path", "")),
        "task": task.config.name,
        "data": str(source),
        "seed": seed,
        "versions": versions(),
        "extras": dict(result.extras),
        "samples": list(result.samples),
        **({"score_histogram": meter.histogram.tolist()} if bins and not dense else {}),
    }


def accounting(cost: ModelCost, meter: SparsityMeter | None) -> dict[str, Any]:
    """Sparsity, GFLOPs and bytes per token of what a meter saw; None for a dense model.

    ``sparsity`` is over the sparse FFNs, ``sparsity_per_layer`` has an entry for each of them.
    """
    per_layer = [] if meter is None else meter.per_layer
    return {
        "sparsity": 0.0 if meter is None else meter.overall,
        "sparsity_per_layer": per_layer,
        "linear_sparsity": cost.linear_sparsity(per_layer),
        "gflops_per_token": cost.gflops_per_token(per_layer),
        "bytes_per_token": cost.bytes_per_token(per_layer),
    }


def load_for_evaluation(path: str, task: Task, *, dense: bool, **kwargs: Any) -> tuple[Any, Any]:
    """Model and tokenizer of a checkpoint; CheckpointError where a dense one was not asked for, or the reverse."""
    check_direction(read_kind(path, dense=dense), task)
    tokenizer = load_tokenizer(path)
    model: Any = load_dense(path, task.auto_class, **kwargs) if dense else load(path, **kwargs)
    if type(model) not in set(task.auto_class._model_mapping.values()):
        raise ConfigError(f"{path} is a {type(model).__name__}, which task={task.config.name!r} cannot use")
    return model.to(default_device()), tokenizer


def load_to_compare(path: str) -> Any:
    """A dense or a sparse language model, for ``against``."""
    return (load(path) if is_sparse_config(read_config(path)) else load_dense(path)).to(default_device()).eval()


def read_kind(path: str, *, dense: bool, flag: str = "--dense") -> Any:
    """The config of a checkpoint that is dense, or sparse, as asked for; CheckpointError otherwise.

    Args:
        path: folder, hub id or .gguf file.
        dense: what was asked for.
        flag: how it is asked for.
    """
    config = read_config(path)
    if is_sparse_config(config) and dense:
        raise CheckpointError(f"{path} is a sparse checkpoint; evaluate it without {flag}")
    if not is_sparse_config(config) and not dense:
        raise CheckpointError(
            f"{path} is a dense checkpoint; make it sparse with `lte train`, or evaluate it as a baseline with {flag}"
        )
    return config


def check_direction(config: Any, task: Task) -> None:
    """ConfigError for language modelling with an encoder, which would see the tokens it has to predict."""
    if task.config.name == "lm" and config.model_type in ("bert", "roberta") and not config.is_decoder:
        raise ConfigError(
            f"model_type={config.model_type!r} is an encoder: it sees the tokens it would have to predict; "
            "use --task classify, or a decoder"
        )
