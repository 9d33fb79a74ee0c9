"""GGUF files as dense models: read, saved and loaded as plain ones, and told apart from what cannot be read."""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lte
from lte import gguf as module
from lte.errors import CheckpointError, LTEError
from lte.hub import read_config
from tests import models
from tests.smollm2 import needs_gguf, needs_smollm2, smollm2_file
from tests.tasks.tiny import SPECIALS, VOCAB

TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection as GGUF has them: the halves of a rotary pair beside each other."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path: Path, model: torch.nn.Module, kind: str = "F32") -> None:
    """A llama of tests.models in a GGUF file, with a tokenizer of one token per byte and a chat template."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = [*list(VOCAB)[: config.vocab_size - 2], "Ġ", "at"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    kinds = gguf.TokenType
    writer.add_token_types([kinds.CONTROL if token in SPECIALS else kinds.NORMAL for token in tokens])
    writer.add_token_merges(["a t"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    top = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    for key, value in model.state_dict().items():
        if key in top:
            name = top[key]
        else:
            part = key.split(".")[-2]
            name = f"blk.{key.split('.')[2]}.{names[part]}"
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(part)
            value = value if heads is None else permuted(value, heads)
        data, as_kind = value.float().numpy(), gguf.GGMLQuantizationType.F32
        if kind != "F32" and value.ndim == 2:
            as_kind = gguf.GGMLQuantizationType[kind]
            data = gguf.quants.quantize(data, as_kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=as_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def build() -> torch.nn.Module:
    return models.build("llama")


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, build())
    return path


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(**models.inputs()).logits


def assert_plain(model) -> None:
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")
    assert all(parameter.requires_grad for parameter in model.parameters())


def assert_round_trip(model, tokenizer, folder) -> None:
    """Saved as a plain checkpoint, and the same after loading."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert not list(folder.glob("*.gguf"))
    again = AutoModelForCausalLM.from_pretrained(folder)
    state = again.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    kept = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "Where is the cat?"}]
    assert kept.chat_template == tokenizer.chat_template
    assert kept.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(chat, tokenize=False)
    assert kept("A cat sat.")["input_ids"] == tokenizer("A cat sat.")["input_ids"]


def test_the_model_of_a_file_is_the_model_that_was_written(file):
    model = lte.load_dense(file)
    torch.testing.assert_close(logits(model), logits(build()), atol=1e-5, rtol=1e-5)
    assert_plain(model)


def test_it_saves_as_a_plain_model_with_tokenizer_and_chat_template(file, tmp_path):
    tokenizer = lte.load_tokenizer(file)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.decode(tokenizer("cat")["input_ids"], skip_special_tokens=True) == "cat"
    assert_round_trip(lte.load_dense(file), tokenizer, tmp_path / "plain")
    read_config(tmp_path / "plain")


def test_quantised_weights_come_back_as_numbers_close_to_them(tmp_path):
    write_gguf(tmp_path / "q.gguf", build(), "Q8_0")
    model = lte.load_dense(tmp_path / "q.gguf", dtype=torch.float32)
    assert_plain(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    written = build().state_dict()
    for key, value in model.state_dict().items():
        assert (value - written[key]).abs().max() <= written[key].abs().max() / 127


def test_it_is_made_sparse_and_trains_like_any_model(file, tmp_path):
    model = lte.load_dense(file)
    lte.sparsify(model, lte.LTEConfig(expert_size=8, grouping="random", router_init="random"))
    inputs = models.inputs()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None
    model.save_pretrained(tmp_path / "sparse")
    torch.testing.assert_close(logits(lte.load(tmp_path / "sparse")), logits(model))


def test_without_the_package_the_error_says_what_to_install(file, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    for open_it in (lte.load_dense, lte.load_tokenizer, read_config):
        with pytest.raises(LTEError, match=r"needs the package gguf; pip install 'learn-to-be-efficient\[gguf\]'"):
            open_it(file)


@needs_gguf
def test_a_missing_file_is_named_with_those_beside_it(file):
    with pytest.raises(CheckpointError, match=r"no file '.*other\.gguf'; its folder has tiny\.gguf"):
        lte.load_dense(file.with_name("other.gguf"))
    with pytest.raises(CheckpointError, match=r"no file '\./nowhere/x\.gguf'; give a \.gguf file"):
        lte.load_tokenizer("./nowhere/x.gguf")


@needs_gguf
def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    path = tmp_path / "page.gguf"
    path.write_text("<html>not found</html>")
    for open_it in (lte.load_dense, lte.load_tokenizer, read_config):
        with pytest.raises(CheckpointError, match="is not a GGUF file: it does not begin with 'GGUF'"):
            open_it(path)


def test_a_truncated_file_is_refused(file, tmp_path):
    path = tmp_path / "half.gguf"
    path.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"half\.gguf"):
        lte.load_dense(path)


def test_a_folder_named_like_a_file_is_a_folder(file, tmp_path):
    folder = tmp_path / "model.gguf"
    build().save_pretrained(folder)
    torch.testing.assert_close(logits(lte.load_dense(folder)), logits(build()))
    assert module.split_path("owner/repo/file.gguf") == ("owner/repo", "file.gguf")
    assert module.split_path(file) == (str(file.parent), file.name)
    assert module.split_path(tmp_path) is None


@pytest.mark.slow
@needs_gguf
@needs_smollm2
def test_a_real_model(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    # transformers reads the header, of 100,000 strings, for the config, the weights and the tokenizer, and makes the
    # same table of names for every module.
    for name in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
    path = smollm2_file()
    model, tokenizer = lte.load_dense(path), lte.load_tokenizer(path)
    assert_plain(model)
    assert "<|im_start|>" in tokenizer.chat_template
    ids = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(answer[0]).strip().endswith("Paris.")
    assert_round_trip(model, tokenizer, tmp_path / "plain")
    shutil.rmtree(tmp_path / "plain")
