"""Tiny random models, one per family; and inputs for them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

VOCAB, D_MODEL, D_FF, LAYERS = 97, 32, 64, 2
EXPERT = 8

_llama_like = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": D_FF,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_encoder = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": D_FF,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "num_labels": 3,
}

CONFIGS = {
    "llama": LlamaConfig(**_llama_like),
    "llama-bias-relu": LlamaConfig(**_llama_like, mlp_bias=True, hidden_act="relu"),
    "mistral": MistralConfig(**_llama_like),
    "qwen2": Qwen2Config(**_llama_like),
    "qwen3": Qwen3Config(**_llama_like, head_dim=8),
    "gemma": GemmaConfig(**_llama_like, head_dim=8, hidden_act="gelu_pytorch_tanh"),
    "phi3": Phi3Config(**_llama_like),
    "opt": OPTConfig(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        word_embed_proj_dim=D_MODEL,
        ffn_dim=D_FF,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCAB,
        n_embd=D_MODEL,
        n_inner=D_FF,
        n_layer=LAYERS,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "gpt_neox": GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        intermediate_size=D_FF,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "bert": BertConfig(**_encoder),
    "bert-relu": BertConfig(**_encoder, hidden_act="relu"),
    "roberta": RobertaConfig(**_encoder),
}
ENCODERS = {"bert", "bert-relu", "roberta"}
UNKNOWN = Gemma2Config(**_llama_like, head_dim=8)


def build(name: str, seed: int = 0) -> torch.nn.Module:
    """A random model of a family, in eval mode. Biases are random too: families start them at zero."""
    torch.manual_seed(seed)
    auto = AutoModelForSequenceClassification if name in ENCODERS else AutoModelForCausalLM
    model = auto.from_config(copy.deepcopy(CONFIGS[name])).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.ndim == 2:
                parameter.normal_(std=0.15)
    return model


def inputs(batch: int = 2, length: int = 11, seed: int = 1) -> dict[str, Tensor]:
    """Token ids without padding, and an attention mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def open_routers(model: torch.nn.Module) -> None:
    """Make every expert run for every token."""
    from lte.nn import sparse_ffns

    for ffn in sparse_ffns(model):
        with torch.no_grad():
            ffn.router.weight.zero_()
            ffn.router.bias.fill_(5.0)


def spread_routers(model: torch.nn.Module, seed: int = 3) -> None:
    """Make about half of the experts run, which ones depending on the token."""
    from lte.nn import sparse_ffns

    generator = torch.Generator().manual_seed(seed)
    for ffn in sparse_ffns(model):
        with torch.no_grad():
            ffn.router.weight.copy_(torch.randn(ffn.router.weight.shape, generator=generator))
            ffn.router.bias.zero_()
