"""The model type ``lte`` of lm-evaluation-harness: sparse models on the fast path, dense ones beside them."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationMixin

from lte.accounting import model_cost
from lte.errors import ConfigError
from lte.evaluate import accounting, read_kind
from lte.hub import default_device, load, load_dense, load_tokenizer
from lte.inference import prepare_for_inference
from lte.inference.crossover import FILE_NAME
from lte.nn import SparsityMeter, observe_routing, sparse_ffns
from lte.tasks import Progress
from lte.thresholds import set_sparsity

logger = logging.getLogger(__name__)

MAX_LOGITS = 2**28
"""Logits of one batch at most, 1 GiB of them in float32: rows of long continuations run in smaller batches."""

AUTO_BATCH_ON_CPU = 16
"""What ``batch_size=auto`` is on a CPU, where trying out sizes up to memory's end would take minutes."""

HARNESS_DEVICE = "cuda:0"
"""What the harness' command line asks for where nobody did; its own models take the CPU then, if there is no GPU."""

HARNESS_OPTIONS = (
    "truncation",
    "add_bos_token",
    "prefix_token_id",
    "think_end_token",
    "enable_thinking",
    "chat_template_args",
)
IGNORED_OPTIONS = ("logits_cache", "trust_remote_code", "parallelize", "use_fast_tokenizer", "backend")
"""Options of the model type ``hf`` that are taken as they are, and those that would change nothing here."""

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""What the harness asks: (texts, to tell it afterwards), tokens of the context, tokens to be scored."""


@register_model("lte")
class LTEModel(HFLM):
    """A checkpoint as the harness wants it; counts sparsity over the tokens that are really run, padding left out.

    It asks nothing of the harness that ``--model hf`` does not: prompts, tokens and metrics are the harness' own. What
    it does itself is one forward for all continuations of a context, the LM head only where something is scored, and
    the softmax in float32.

    Args:
        pretrained: a sparse checkpoint: folder or hub id.
        dense: ``pretrained`` is a dense model (or ``.gguf`` file).
        sparsity: run at this sparsity, from the points ``lte calibrate`` left.
        dtype: of the weights, ``auto`` takes the checkpoint's.
        device: the accelerator by default, where there is one.
        batch_size: rows per forward, or ``auto``; does not change the result.
        max_batch_size: the most that ``auto`` tries.
        max_length: longest input in tokens; the model's positions by default.
        progress: called with requests done and in all, instead of a progress bar.
        **options: see :data:`HARNESS_OPTIONS`.

    Raises:
        CheckpointError: the checkpoint is dense and ``dense`` was not asked for, or the reverse.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        dense: bool = False,
        sparsity: float | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = 64,
        max_length: int | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> None:
        passed = {key: value for key, value in options.items() if key in HARNESS_OPTIONS}
        _refuse_unknown(options)
        model = _load(pretrained, dense=dense, sparsity=sparsity, dtype=dtype)
        with quiet_harness():
            super().__init__(
                model.to(_device(device)),
                tokenizer=load_tokenizer(pretrained),
                backend="causal",
                batch_size=_batch_size(batch_size),
                max_batch_size=max_batch_size or 64,
                max_length=max_length,
                softmax_dtype="float32",
                **passed,
            )
        self.pretrained = pretrained
        self.progress = progress
        self.dense = dense
        if not dense:
            # Only now: the harness ties the weights once more, which would undo the packing.
            folder = Path(pretrained)
            table = folder if (folder / FILE_NAME).is_file() else None
            prepare_for_inference(model, crossover=table, mask_prompts=True)
        self.cost = model_cost(model)
        self.meter = SparsityMeter(len(sparse_ffns(model)))
        self.tokens = 0
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def accounting(self) -> dict[str, Any]:
        """Sparsity, overall and per layer, and FLOPs of what was run so far, and its number of tokens."""
        return {**accounting(self.cost, None if self.dense else self.meter), "tokens": self.tokens}

    def get_model_info(self) -> dict[str, Any]:
        """What the harness records of a model, with :meth:`accounting` as ``lte``."""
        info: dict[str, Any] = super().get_model_info()
        return {**info, "lte": self.accounting()} if self.tokens else info

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether it is what greedy decoding gives) of each request's continuation."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise ConfigError(
                    f"a text of {len(continuation)} tokens is to be scored, more than max_length={self.max_length}"
                )
            # The last token is only predicted; what is too long loses its beginning.
            tokens = tuple((context + continuation)[-(self.max_length + 1) : -1])
            rows.setdefault(tokens, []).append(index)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        done = 0
        shown = tqdm(total=len(requests), disable=disable_tqdm or self.progress is not None, desc="scoring requests")
        for batch, keep in self._batches(rows, requests, override_bs):
            for tokens, logits_KV in zip(batch, self._logits(batch, keep), strict=True):
                # Row b's logits are those of the last positions of the padded batch.
                end = len(logits_KV) - (len(batch[0]) - len(tokens))
                for index in rows[tokens]:
                    text, _, continuation = requests[index]
                    answers[index] = _score(logits_KV[end - len(continuation) : end], continuation)
                    if text is not None:
                        self.cache_hook.add_partial("loglikelihood", text, answers[index])
                    done += 1
                    shown.update()
                    if self.progress is not None:
                        self.progress(done, len(requests))
        shown.close()
        return answers

    def _batches(
        self, rows: dict[tuple[int, ...], list[int]], requests: Sequence[Request], size: int | None
    ) -> Iterator[tuple[list[tuple[int, ...]], int]]:
        """Rows of similar length, longest first, and the number of last positions that their logits are needed at."""
        size = size or self._rows_per_batch(requests)
        vocabulary = self.model.config.get_text_config().vocab_size
        batch: list[tuple[int, ...]] = []
        keep = 0
        for tokens in sorted(rows, key=lambda tokens: (-len(tokens), tokens)):
            longest = len(batch[0]) if batch else len(tokens)
            scored = max(len(requests[index][2]) for index in rows[tokens])
            needed = max(keep, longest - len(tokens) + scored)
            run = needed if self._keeps else longest
            if batch and (len(batch) == size or (len(batch) + 1) * run * vocabulary > MAX_LOGITS):
                yield batch, keep
                batch, needed = [], scored
            batch.append(tokens)
            keep = needed
        if batch:
            yield batch, keep

    def _rows_per_batch(self, requests: Sequence[Request]) -> int:
        if self.batch_size != "auto":
            return int(self.batch_size)
        if self.device.type == "cpu":
            return AUTO_BATCH_ON_CPU
        longest = sorted(requests, key=lambda request: -len(request[1]) - len(request[2]))
        return int(self._detect_batch_size(longest, 0))

    def _logits(self, rows: Sequence[Sequence[int]], keep: int) -> Tensor:
        """Logits [B, K, V] at the last ``keep`` positions (all where the model cannot) of rows padded on the right."""
        longest = max(map(len, rows))
        ids_BS = torch.zeros(len(rows), longest, dtype=torch.long)
        mask_BS = torch.zeros(len(rows), longest, dtype=torch.bool)
        for row, tokens in enumerate(rows):
            ids_BS[row, : len(tokens)] = torch.tensor(tokens)
            mask_BS[row, : len(tokens)] = True
        self.tokens += int(mask_BS.sum())
        options = {"logits_to_keep": keep} if self._keeps else {}
        # No attention mask: attention looks back only, and padding comes last.
        with torch.no_grad(), observe_routing(self.model, self.meter):
            self.meter.set_token_mask(mask_BS)
            logits: Tensor = self.model(input_ids=ids_BS.to(self.device), use_cache=False, **options).logits
            self.meter.set_token_mask(False)
        return logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """The harness' generation, on the fast path; prompt and answer are then run once more to be counted."""
        output_BS: Tensor = super()._model_generate(context, max_length, stop, **options)
        attended = options.get("attention_mask", torch.ones_like(context)).bool()
        width = context.shape[1]
        rows = []
        for prompt, real, answer in zip(context, attended, output_BS[:, width:].tolist(), strict=True):
            rows.append(prompt[real].tolist() + answer[: self._answer_length(answer, stop)])
        self._logits(rows, 1)
        return output_BS

    def _answer_length(self, answer: list[int], stop: list[str]) -> int:
        """Tokens up to the first stop or end; a row goes on until the whole batch has stopped."""
        end = answer.index(self.eot_token_id) + 1 if self.eot_token_id in answer else len(answer)
        shortest = 0
        while shortest < end:
            middle = (shortest + end) // 2
            text = self.tok_decode(answer[:middle], skip_special_tokens=False)
            if any(word in text for word in stop):
                end = middle
            else:
                shortest = middle + 1
        return end


@contextmanager
def quiet_harness() -> Iterator[None]:
    """The harness tells much that is no news to a user of ours; errors are raised anyway."""
    told = logging.getLogger("lm_eval")
    level = told.level
    told.setLevel(logging.ERROR)
    try:
        yield
    finally:
        told.setLevel(level)


def _load(path: str, *, dense: bool, sparsity: float | None, dtype: Any) -> Any:
    if not isinstance(path, str):
        raise ConfigError(f"pretrained={path!r} must be a folder, hub id or .gguf file")
    if dense and sparsity is not None:
        raise ConfigError(f"sparsity={sparsity} goes with a sparse model; leave out dense")
    read_kind(path, dense=dense, flag="--dense (dense=True)")
    model = load_dense(path, AutoModelForCausalLM, dtype=dtype) if dense else load(path, dtype=dtype)
    if not isinstance(model, GenerationMixin) or type(model) not in set(AutoModelForCausalLM._model_mapping.values()):
        raise ConfigError(f"{path} is a {type(model).__name__}; these tasks are for causal language models")
    if sparsity is not None:
        set_sparsity(model, float(sparsity))
    return model


def _refuse_unknown(options: dict[str, Any]) -> None:
    known = (*HARNESS_OPTIONS, *IGNORED_OPTIONS, "dense", "sparsity", "dtype", "max_length")
    for key in options:
        if key in known:
            continue
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are pretrained, {', '.join(known)}"
        raise ConfigError(f"unknown model argument {key}={options[key]!r}; {hint}")


def _device(name: str | torch.device | None) -> torch.device:
    if name is None:
        return default_device()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r} is unknown; leave it out, or give cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        if str(device) == HARNESS_DEVICE:
            return default_device()
        raise ConfigError(f"device={name!r}: no GPU is visible to torch; leave it out, or give cpu")
    return device


def _batch_size(size: int | str | None) -> int | str:
    if size is None:
        return 1
    if str(size).startswith("auto"):
        return "auto"
    if not str(size).isdigit() or int(size) < 1:
        raise ConfigError(f"batch_size={size!r} must be a number of rows, at least 1, or auto")
    return int(size)


def _score(logits_KV: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Log-probability of a continuation of K tokens and whether it is the greedy one."""
    tokens_K = torch.tensor(continuation, device=logits_KV.device)
    chosen = logits_KV.float().log_softmax(-1).gather(1, tokens_K[:, None])
    return float(chosen.sum()), bool((logits_KV.argmax(-1) == tokens_K).all())
