"""Tiny tokenizers and random models; nothing here is downloaded."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

SPECIALS = ["<pad>", "<s>", "</s>", "[CLS]", "[SEP]", "<|im_start|>", "<|im_end|>"]
VOCAB = {token: number for number, token in enumerate(SPECIALS + sorted(pre_tokenizers.ByteLevel.alphabet()))}


def byte_tokenizer(*, bos=False, eos=True, pad=True, classify=False, chat_template=None):
    """One token per byte, so that text and tokens can be compared by eye."""
    backend = Tokenizer(models.BPE(vocab=VOCAB, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special_ids = [(token, VOCAB[token]) for token in SPECIALS]
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=special_ids)
    if classify:
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special_ids
        )
    named = {"bos_token": "<s>" if bos else None, "eos_token": "</s>" if eos else None}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>" if pad else None,
        additional_special_tokens=SPECIALS[5:],
        model_input_names=["input_ids", "token_type_ids", "attention_mask"]
        if classify
        else ["input_ids", "attention_mask"],
        **{key: value for key, value in named.items() if value is not None},
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_llama(positions=256, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCAB),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def tiny_bert(seed=0, **kwargs):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(VOCAB),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.5,
        **kwargs,
    )
    return BertForSequenceClassification(config).eval()


class Watch:
    """Plays the statistics: which input tokens of a model's forwards were announced as counting."""

    def __init__(self, model):
        self.mask = False
        self.counted = []
        self.last_told = "nothing"
        model.register_forward_pre_hook(self._forward, with_kwargs=True)

    def set_token_mask(self, mask):
        self.mask = self.last_told = mask

    def _forward(self, module, args, kwargs):
        if self.mask is not False:
            assert self.mask.dtype == torch.bool
            assert self.mask.shape == kwargs["input_ids"].shape
            self.counted += kwargs["input_ids"][self.mask].tolist()
