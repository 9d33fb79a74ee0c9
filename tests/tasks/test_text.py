import math

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from lte.errors import ConfigError, DataError
from lte.tasks import ClassifyTask, LanguageTask, TaskConfig
from lte.tasks.scoring import window_spans
from lte.tasks.sources import CONTINUES_COLUMN
from tests.tasks.tiny import VOCAB, Watch, byte_tokenizer, tiny_llama

TEXTS = ["Once upon a time there was a sparse model.", "", "It was quick.\nAnd small.", "The end é."]


def texts(*values):
    return Dataset.from_dict({"text": list(values or TEXTS)})


def lm(**values):
    return LanguageTask(TaskConfig(name="lm", **values))


def stream_of(tokenizer, values=TEXTS, *, bos=False, eos=True):
    ids = []
    for text in values:
        if text:
            ids += [VOCAB["<s>"]] * bos + tokenizer(text, add_special_tokens=False).input_ids
            ids += [VOCAB["</s>"]] * eos
    return ids


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_packing_round_trip(bos, eos):
    tokenizer = byte_tokenizer(bos=bos, eos=eos)
    blocks = lm(context_length=7).prepare(texts(), tokenizer)
    expected = stream_of(tokenizer, bos=bos, eos=eos)
    packed = [token for block in blocks["input_ids"] for token in block]
    assert packed == expected[: len(expected) // 7 * 7]
    assert all(len(block) == 7 for block in blocks["input_ids"])
    assert blocks["labels"][:] == blocks["input_ids"][:]
    assert set(blocks.column_names) == {"input_ids", "labels"}


def test_packing_over_many_batches_of_short_rows():
    tokenizer = byte_tokenizer()
    values = [f"row {number}" for number in range(300)]
    blocks = lm(context_length=900).prepare(texts(*values), tokenizer)
    packed = [token for block in blocks["input_ids"] for token in block]
    assert packed == stream_of(tokenizer, values)[: len(packed)]
    assert len(packed) == len(stream_of(tokenizer, values)) // 900 * 900


def test_pieces_of_one_document_are_joined():
    tokenizer = byte_tokenizer(bos=True)
    rows = Dataset.from_dict({"text": ["ab", "cd", "", "e"], CONTINUES_COLUMN: [True, True, False, False]})
    blocks = lm(context_length=9).prepare(rows, tokenizer)
    assert tokenizer.decode(blocks[0]["input_ids"]) == "<s>abcd</s><s>e</s>"


def test_text_shorter_than_a_block():
    with pytest.raises(DataError) as error:
        lm(context_length=64).prepare(texts("tiny"), byte_tokenizer())
    assert str(error.value) == (
        "the text has 5 tokens, fewer than one block of context_length=64; give more text or a smaller context_length"
    )


def test_collator_on_packed_rows():
    tokenizer = byte_tokenizer()
    task = lm(context_length=8)
    blocks = task.prepare(texts(), tokenizer)
    batch = task.collator(tokenizer)([blocks[0], blocks[1]])
    assert batch["input_ids"].tolist() == blocks[:2]["input_ids"]
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert batch["attention_mask"].tolist() == [[1] * 8] * 2


@pytest.mark.parametrize(("total", "length", "stride"), [(1, 4, 2), (4, 4, 2), (5, 4, 2), (23, 8, 3), (24, 8, 7)])
def test_windows_make_every_token_new_once(total, length, stride):
    spans = window_spans(total, length, stride)
    new = [token for begin, end, first_new in spans for token in range(first_new, end)]
    assert new == list(range(total))
    assert all(end - begin <= length for begin, end, _ in spans)
    assert all(first_new - begin == length - stride for begin, _, first_new in spans[1:])


def naive_cross_entropy(model, ids, length, stride):
    """Token by token, each in a forward of its own."""
    losses = []
    for position in range(1, len(ids)):
        begin = 0
        while begin + length <= position:
            begin += stride
        logits = model(torch.tensor([ids[begin:position]])).logits[0, -1]
        losses.append(F.cross_entropy(logits.double(), torch.tensor(ids[position])).item())
    return sum(losses) / len(losses)


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 5, 11, None])
def test_sliding_window_equals_token_by_token(llama, stride):
    tokenizer = byte_tokenizer()
    result = lm(context_length=12, stride=stride).evaluate(
        llama, tokenizer, texts(), batch_size=3, set_token_mask=lambda mask: None
    )
    expected = naive_cross_entropy(llama, stream_of(tokenizer), 12, stride or 6)
    assert result.metric == "perplexity"
    assert result.extras["cross_entropy"] == pytest.approx(expected, abs=1e-5)
    assert result.value == pytest.approx(math.exp(expected), rel=1e-4)
    assert result.tokens == len(stream_of(tokenizer))


@torch.no_grad()
def test_text_within_one_window_equals_the_forward_loss(llama):
    tokenizer = byte_tokenizer()
    ids = torch.tensor([stream_of(tokenizer)])
    result = lm(context_length=200).evaluate(llama, tokenizer, texts(), batch_size=4, set_token_mask=lambda mask: None)
    assert result.extras["cross_entropy"] == pytest.approx(llama(ids, labels=ids).loss.item(), abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_every_token_counts_once_and_batch_size_changes_nothing(llama, batch_size):
    tokenizer = byte_tokenizer(pad=False)
    watch = Watch(llama)
    task = lm(context_length=10, stride=4)
    result = task.evaluate(llama, tokenizer, texts(), batch_size=batch_size, set_token_mask=watch.set_token_mask)
    alone = task.evaluate(llama, tokenizer, texts(), batch_size=1, set_token_mask=lambda mask: None)
    assert watch.counted == stream_of(tokenizer)
    assert watch.last_told is False
    assert result.extras["cross_entropy"] == pytest.approx(alone.extras["cross_entropy"], abs=1e-5)


def test_progress_and_state_of_the_model(llama):
    calls = []
    llama.train()
    state = torch.get_rng_state()
    lm(context_length=32).evaluate(
        llama,
        byte_tokenizer(),
        texts(),
        batch_size=2,
        set_token_mask=lambda mask: None,
        progress=lambda *call: calls.append(call),
    )
    assert calls == [(done, len(calls)) for done in range(1, len(calls) + 1)]
    assert len(calls) > 1
    assert llama.training
    assert torch.equal(torch.get_rng_state(), state)


def test_seed_fixes_what_a_model_draws(llama):
    llama.model.layers[0].register_forward_hook(lambda module, args, out: out + torch.randn_like(out))
    args = (llama, byte_tokenizer(), texts())
    values = [
        lm(context_length=32).evaluate(*args, batch_size=2, set_token_mask=lambda mask: None, seed=seed).value
        for seed in (3, 3, 4)
    ]
    assert values[0] == values[1] != values[2]


def test_context_is_fitted_to_the_model(caplog):
    model = tiny_llama(positions=16)
    result = lm(context_length=512).evaluate(
        model, byte_tokenizer(), texts(), batch_size=2, set_token_mask=lambda mask: None
    )
    assert "context_length=512 is more than the model's 16 positions; using 16" in caplog.text
    assert math.isfinite(result.value)


def test_refusals(llama):
    with pytest.raises(DataError, match="the text has 1 tokens; perplexity needs at least 2, give more text"):
        lm().evaluate(llama, byte_tokenizer(eos=False), texts("a"), batch_size=1, set_token_mask=lambda mask: None)
    with pytest.raises(ConfigError, match="batch_size=0 must be at least 1"):
        lm().evaluate(llama, byte_tokenizer(), texts(), batch_size=0, set_token_mask=lambda mask: None)


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        (
            {"a": ["x"], "b": ["y"], "c": [1]},
            {},
            "cannot tell which column is the text: the data has a, b, c, of which text: a, b; set text_column",
        ),
        (
            {"a": ["x"], "c": [1]},
            {"text_column": "t"},
            "text_column='t' is not a column of the data; it has a, c; set text_column to one of them",
        ),
        (
            {"a": ["x"], "c": [1]},
            {"text_column": "c"},
            "text_column='c' holds int64, not text; columns of text: a",
        ),
        (
            {"text": ["x", None]},
            {},
            "row 1 has no value in column 'text'; remove the row or fill it in",
        ),
    ],
)
def test_unusable_columns(columns, settings, message):
    with pytest.raises(DataError) as error:
        lm(**settings).prepare(Dataset.from_dict(columns), byte_tokenizer())
    assert str(error.value) == message


def test_only_string_column_is_the_text():
    rows = Dataset.from_dict({"story": ["abcdef"], "year": [1999]})
    assert len(lm(context_length=3).prepare(rows, byte_tokenizer())) == 2


def test_predictions_are_compared_with_another_models(llama):
    tokenizer, other = byte_tokenizer(), tiny_llama(seed=1)
    task, options = lm(context_length=16, stride=8), {"batch_size": 2, "set_token_mask": lambda mask: None}
    alone = task.evaluate(llama, tokenizer, texts(), **options)
    beside = task.evaluate(llama, tokenizer, texts(), against=other, **options)
    assert alone.value == beside.value
    assert set(beside.extras) - set(alone.extras) == {"kl_divergence", "same_top"}
    stream = torch.tensor([stream_of(tokenizer)])
    q, p = [], []
    for begin, end, first in window_spans(stream.shape[1], 16, 8):
        for model, found in ((llama, q), (other, p)):
            with torch.no_grad():
                logits = model(stream[:, begin:end]).logits[0].log_softmax(-1)
            found.append(logits[max(first, 1) - begin - 1 : -1])
    q, p = torch.cat(q), torch.cat(p)
    assert len(q) == stream.shape[1] - 1
    assert beside.extras["kl_divergence"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert beside.extras["same_top"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    same = task.evaluate(llama, tokenizer, texts(), against=tiny_llama(), **options).extras
    assert same["kl_divergence"] == pytest.approx(0, abs=1e-6)
    assert same["same_top"] == 1


def test_what_cannot_be_compared_is_refused(llama):
    options = {"batch_size": 2, "set_token_mask": lambda mask: None}
    other = tiny_llama()
    other.resize_token_embeddings(len(VOCAB) - 3)
    with pytest.raises(ConfigError, match=r"263 tokens and .* 260; predictions are compared token by token"):
        lm(context_length=16).evaluate(llama, byte_tokenizer(), texts(), against=other, **options)
    with pytest.raises(ConfigError, match="task='classify' predicts no tokens"):
        ClassifyTask(TaskConfig(name="classify")).evaluate(llama, byte_tokenizer(), texts(), against=llama, **options)
