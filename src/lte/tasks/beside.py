"""How far a model's predictions are from another's: KL divergence, and the share of tokens both find most likely."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lte.errors import ConfigError


class Beside:
    """Runs another model on the same batches, and compares what both predict of the scored tokens.

    Args:
        model: what predictions are held against, with the same tokens; for a quantised model the one of 16 bits.
        measured: the model that is evaluated.

    Raises:
        ConfigError: the two have vocabularies of different sizes.
    """

    def __init__(self, model: PreTrainedModel, measured: PreTrainedModel) -> None:
        sizes = [each.get_input_embeddings().num_embeddings for each in (measured, model)]
        if sizes[0] != sizes[1]:
            raise ConfigError(
                f"the model has {sizes[0]} tokens and {model.config.name_or_path or 'the one beside it'} {sizes[1]}; "
                "predictions are compared token by token, so give one with the same tokenizer"
            )
        self.model = model
        self.tokens = 0
        self._divergence = torch.zeros((), dtype=torch.float64)
        self._same = 0

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """[B, S, V], of the other model."""
        inputs = {name: batch[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        found: Tensor = self.model(**inputs, use_cache=False).logits
        return found

    def add(self, logits_TV: Tensor, wanted_TV: Tensor) -> None:
        """Compare the predictions of some tokens with those of the other model."""
        wanted_TV = wanted_TV.to(logits_TV.device)
        log_q, log_p = (each.float().log_softmax(-1) for each in (logits_TV, wanted_TV))
        self._divergence += (log_p.exp() * (log_p - log_q)).sum(-1).double().sum().cpu()
        self._same += int((logits_TV.argmax(-1) == wanted_TV.argmax(-1)).sum())
        self.tokens += len(logits_TV)

    def numbers(self) -> dict[str, float]:
        """``kl_divergence``, in nats a token, and ``same_top``, a share."""
        return {"kl_divergence": float(self._divergence) / self.tokens, "same_top": self._same / self.tokens}
