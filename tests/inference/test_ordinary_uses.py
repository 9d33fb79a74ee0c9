"""What people do with a model of transformers, done with a prepared sparse one: the same tokens, or a refusal."""

from __future__ import annotations

import copy
import importlib.util
import json
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache, pipeline

import lte
from lte.inference.prepare import restore
from tests import models
from tests.tasks.tiny import byte_tokenizer

IDS = models.inputs(1, 6)["input_ids"]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def sparse(*, prepared: bool):
    config = lte.LTEConfig(expert_size=8, grouping="random", router_init="random")
    model = lte.sparsify(models.build("llama"), config).eval()
    models.spread_routers(model)
    return lte.prepare_for_inference(model) if prepared else model


@pytest.fixture(scope="module")
def wanted():
    return sparse(prepared=False).generate(IDS, **GREEDY)


@pytest.fixture
def model():
    return sparse(prepared=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": True},
        {"past_key_values": True},
        {"output_hidden_states": True, "output_logits": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_greedy_generation(model, wanted, options):
    options = dict(options)
    if "assistant_model" in options:
        options["assistant_model"] = sparse(prepared=True)
    if "past_key_values" in options:
        options["past_key_values"] = DynamicCache(config=model.config)
    made = model.generate(IDS, **GREEDY, **options, return_dict_in_generate=True)
    assert torch.equal(made.sequences, wanted)
    if "output_hidden_states" in options:
        assert len(made.hidden_states[1]) == model.config.num_hidden_layers + 1


def test_attention_weights_are_given(model):
    model.set_attn_implementation("eager")
    made = model.generate(IDS, **GREEDY, output_attentions=True, return_dict_in_generate=True)
    assert made.attentions[1][0].shape[-1] == IDS.shape[1] + 1


def test_beam_search(model):
    found = model.generate(IDS, **GREEDY, num_beams=3)
    assert torch.equal(found, sparse(prepared=False).generate(IDS, **GREEDY, num_beams=3))


def test_embeddings_instead_of_tokens(model, wanted):
    made = model.generate(inputs_embeds=model.get_input_embeddings()(IDS), **GREEDY)
    assert torch.equal(made, wanted[:, IDS.shape[1] :])


def test_padding_on_the_left(model, wanted):
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS], 1)
    both = torch.cat([padded, torch.cat([IDS, IDS[:, :3]], 1)])
    mask = torch.ones_like(both)
    mask[0, :3] = 0
    assert torch.equal(model.generate(both, attention_mask=mask, **GREEDY)[0, 3:], wanted[0])


def test_a_copy_is_a_model_of_its_own(model, wanted):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    del model
    assert torch.equal(other.generate(IDS, **GREEDY), wanted)


def test_other_dtypes_after_it_was_prepared(model):
    found = model.to(torch.bfloat16).generate(IDS, **GREEDY)
    assert torch.equal(found, sparse(prepared=False).to(torch.bfloat16).generate(IDS, **GREEDY))
    assert model.half().generate(IDS, **GREEDY).shape == found.shape


def test_more_tokens_after_it_was_prepared(model, wanted):
    model.resize_token_embeddings(model.config.vocab_size + 5)
    with torch.no_grad():
        model.lm_head.weight[-5:] = 0
    assert model.generate(IDS, **GREEDY).shape == wanted.shape


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_generate_from_one_model(model, wanted, threads):
    found, before = [], torch.get_num_threads()
    torch.set_num_threads(threads)

    def run():
        found.extend(model.generate(IDS, **GREEDY) for _ in range(4))

    workers = [threading.Thread(target=run) for _ in range(3)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        torch.set_num_threads(before)
    assert len(found) == 12
    assert all(torch.equal(each, wanted) for each in found)


def test_forked_workers(model):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            with torch.no_grad():
                return model(IDS).logits[0, -1]

    rows = torch.stack(list(torch.utils.data.DataLoader(Rows(), batch_size=None, num_workers=2)))
    with torch.no_grad():
        torch.testing.assert_close(rows, model(IDS).logits[0, -1].expand(4, -1))


def test_a_pipeline(model):
    tokenizer = byte_tokenizer()
    model.resize_token_embeddings(len(tokenizer))
    made = pipeline("text-generation", model=model, tokenizer=tokenizer)("abc", max_new_tokens=5, do_sample=False)
    ids = tokenizer("abc", return_tensors="pt")
    wanted = restore_plain(model).generate(**ids, max_new_tokens=5, do_sample=False)
    assert made[0]["generated_text"] == tokenizer.decode(wanted[0], skip_special_tokens=True)


def restore_plain(model):
    """The same model as nobody prepared it."""
    plain = copy.deepcopy(model)
    restore(plain)
    return plain


def test_a_quantised_cache_is_used_or_its_package_asked_for(model):
    cache = {"backend": "quanto", "nbits": 4, "q_group_size": 8}
    settings = {"cache_implementation": "quantized", "cache_config": cache, "max_new_tokens": 4, "do_sample": False}
    if importlib.util.find_spec("optimum") is None and importlib.util.find_spec("hqq") is None:
        with pytest.raises(ImportError, match="quanto"):
            model.generate(IDS, **settings)
    else:
        assert torch.equal(model.generate(IDS, **settings), restore_plain(model).generate(IDS, **settings))


def test_other_engines_are_told_that_the_format_is_ours(model, tmp_path):
    model.save_pretrained(tmp_path)  # vLLM and llama.cpp's converter refuse a quant_method they do not know
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "lte"


def test_training_goes_on_after_it_was_prepared(model):
    model.gradient_checkpointing_enable()
    model.train()
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "router" not in name)


def test_a_device_map(wanted, tmp_path):
    sparse(prepared=False).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert torch.equal(loaded.generate(IDS, **GREEDY), wanted)


def test_another_quantisation_beside_ours_is_refused(tmp_path):
    sparse(prepared=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantized with SparsityConfig but you are passing a BitsAndBytesConfig"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


@pytest.mark.slow
def test_compiled(model):
    with torch.no_grad():
        found = torch.compile(model)(IDS).logits
        torch.testing.assert_close(found, sparse(prepared=False)(IDS).logits, atol=1e-4, rtol=1e-3)
