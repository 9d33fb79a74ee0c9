import sys

import pytest
import sacrebleu
import torch
from datasets import Dataset
from rouge_score.rouge_scorer import RougeScorer
from transformers import GenerationConfig

from lte.errors import ConfigError, DataError, LTEError
from lte.tasks import LanguageTask, TaskConfig
from lte.tasks.collate import IGNORED
from lte.tasks.prompts import generate_greedily, group_examples
from tests.tasks.tiny import VOCAB, Watch, byte_tokenizer

ROWS = {
    "prompt": ["name[A]", "name[A]", "name[Bottle], area[x]", "q", "name[A]"],
    "target": ["A is.", "It is A.", "Bottle is in x.", "r", "A again."],
}


def rows(columns=ROWS):
    return Dataset.from_dict(columns)


def lm(**values):
    return LanguageTask(TaskConfig(name="lm", prompt_column="prompt", target_column="target", **values))


def ignore(mask):
    pass


@pytest.mark.parametrize("bos", [False, True])
def test_loss_is_on_the_target_only(bos):
    tokenizer = byte_tokenizer(bos=bos)
    prepared = lm().prepare(rows(), tokenizer)
    for row, prompt, target in zip(prepared, ROWS["prompt"], ROWS["target"], strict=True):
        start = "<s>" if bos else ""
        assert tokenizer.decode(row["input_ids"]) == f"{start}{prompt}\n{target}</s>"
        learned = [label for label in row["labels"] if label != IGNORED]
        assert tokenizer.decode(learned) == f"{target}</s>"
        assert row["labels"][-len(learned) :] == learned
        assert row["attention_mask"] == [1] * len(row["input_ids"])


def test_prompt_gives_no_gradient(llama):
    tokenizer = byte_tokenizer()
    task = lm()
    prepared = task.prepare(rows({"prompt": ["abc", "a much longer prompt"], "target": ["x", "yz"]}), tokenizer)
    batch = task.collator(tokenizer)(list(prepared))
    assert batch["input_ids"][0, -1] == VOCAB["<pad>"]
    assert batch["attention_mask"][0].sum() == len(prepared[0]["input_ids"])
    logits = llama(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logits.retain_grad()
    llama.loss_function(logits, batch["labels"], vocab_size=logits.shape[-1]).backward()
    touched = logits.grad.abs().sum(-1) > 0
    assert torch.equal(touched[:, :-1], batch["labels"][:, 1:] != IGNORED)


def test_long_prompt_is_cut_from_the_left_and_keeps_bos():
    tokenizer = byte_tokenizer(bos=True)
    task = lm(context_length=10)
    prepared = task.prepare(rows({"prompt": ["0123456789", "p"], "target": ["abc", "abcdefghijkl"]}), tokenizer)
    assert tokenizer.decode(prepared[0]["input_ids"]) == "<s>6789\nabc</s>"
    assert len(prepared[0]["input_ids"]) == 10
    assert tokenizer.decode(prepared[1]["input_ids"]) == "<s>abcdefghi"


def test_the_start_of_a_long_prompt_can_be_kept():
    tokenizer = byte_tokenizer(bos=True)
    data = rows({"prompt": ["0123456789", "p", "0123456789"], "target": ["abc", "d", "abcdefghijkl"]})
    prepared = lm(context_length=10, keep_prompt="start").prepare(data, tokenizer)
    texts = [tokenizer.decode(row) for row in prepared["input_ids"]]
    assert texts == ["<s>0123\nabc</s>", "<s>p\nd</s>", "<s>abcdefghi"]


def test_padding_with_eos_where_there_is_no_pad_token():
    tokenizer = byte_tokenizer(pad=False)
    batch = lm().collator(tokenizer)([{"input_ids": [9, 9], "labels": [9, 9]}, {"input_ids": [9], "labels": [9]}])
    assert batch["input_ids"].tolist() == [[9, 9], [9, VOCAB["</s>"]]]
    assert batch["labels"].tolist() == [[9, 9], [9, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


def tokenizer_that_ends(model, prompts, bos=False):
    """A tokenizer whose EOS is a token the random model does generate, so that some answers end early."""
    tokenizer = byte_tokenizer(bos=bos)
    answers = generate_greedily(model, tokenizer, prompts, 12)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(answers[0][4])
    return tokenizer


@torch.no_grad()
def test_left_padded_generation_equals_one_by_one(llama):
    prompts = [[40, 50, 60], [70], [80, 90, 100, 110, 120, 130, 140], [33, 34]]
    tokenizer = tokenizer_that_ends(llama, prompts)
    together = generate_greedily(llama, tokenizer, prompts, 12)
    alone = [generate_greedily(llama, tokenizer, [prompt], 12)[0] for prompt in prompts]
    assert together == alone
    assert len(together[0]) <= 4
    assert any(len(answer) == 12 for answer in together)
    by_hand = []
    for _ in range(12):
        by_hand.append(llama(torch.tensor([prompts[2] + by_hand])).logits[0, -1].argmax().item())
    eos = tokenizer.eos_token_id
    assert together[2] == (by_hand[: by_hand.index(eos)] if eos in by_hand else by_hand)


def test_generation_settings_of_the_checkpoint_do_not_matter(llama):
    tokenizer = byte_tokenizer()
    plain = generate_greedily(llama, tokenizer, [[40, 50]], 20)
    llama.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.1,
        top_p=0.5,
        repetition_penalty=9.0,
        max_length=3,
        eos_token_id=plain[0][0],
    )
    assert generate_greedily(llama, tokenizer, [[40, 50]], 20) == plain


def test_consecutive_rows_of_one_prompt_are_one_example():
    examples = group_examples(ROWS["prompt"], ROWS["target"])
    assert [example.prompt for example in examples] == ["name[A]", "name[Bottle], area[x]", "q", "name[A]"]
    assert [example.references for example in examples] == [
        ["A is.", "It is A."],
        ["Bottle is in x."],
        ["r"],
        ["A again."],
    ]


def test_an_input_follows_the_prompt_where_there_is_one():
    tokenizer = byte_tokenizer()
    data = Dataset.from_dict({"prompt": ["Add", "Sing"], "input": ["1 2", ""], "target": ["3", "la"]})
    prepared = lm(input_column="input").prepare(data, tokenizer)
    assert [tokenizer.decode(row["input_ids"]) for row in prepared] == ["Add\n1 2\n3</s>", "Sing\nla</s>"]


@torch.no_grad()
def test_result_by_hand(llama, monkeypatch):
    tokenizer = byte_tokenizer()
    said = {"name[A]": "it is A", "name[Bottle], area[x]": "bottles in x", "q": "nothing"}

    def answer(model, tokenizer, prompts, max_new_tokens):
        texts = [said[tokenizer.decode(prompt).strip()] for prompt in prompts]
        return [tokenizer(text).input_ids for text in texts]

    monkeypatch.setattr("lte.tasks.prompts.generate_greedily", answer)
    result = lm(max_new_tokens=20).evaluate(llama, tokenizer, rows(), batch_size=2, set_token_mask=ignore)
    rouge = RougeScorer(["rougeL"], use_stemmer=True)

    def score(reference, prediction):
        return rouge.score(reference, prediction)["rougeL"].fmeasure

    assert score("It is A.", "it is A") == 1.0
    assert score("A is.", "it is A") < 1.0
    expected = [1.0, score("Bottle is in x.", "bottles in x"), 0.0, score("A again.", "it is A")]
    assert result.metric == "rougeL"
    assert result.value == pytest.approx(sum(expected) / 4)
    assert result.extras["examples"] == 4
    references = [["A is.", "Bottle is in x.", "r", "A again."], ["It is A.", None, None, None]]
    bleu = sacrebleu.corpus_bleu(["it is A", "bottles in x", "nothing", "it is A"], references).score
    assert result.extras["bleu"] == pytest.approx(bleu / 100)
    assert result.samples[0] == {
        "prompt": "name[A]",
        "prediction": "it is A",
        "references": ["A is.", "It is A."],
    }
    assert [sample["prediction"] for sample in result.samples[1:]] == ["bottles in x", "nothing", "it is A"]

    first = {"prompt": ["name[A]", *ROWS["prompt"][2:]], "target": ["A is.", *ROWS["target"][2:]]}
    loss = count = 0
    for row in lm().prepare(rows(first), tokenizer):
        labels = torch.tensor([row["labels"]])
        n_labels = int((labels != IGNORED).sum())
        loss += llama(torch.tensor([row["input_ids"]]), labels=labels).loss.item() * n_labels
        count += n_labels
    assert result.extras["cross_entropy"] == pytest.approx(loss / count, abs=1e-5)


def test_statistics_see_prompt_and_answer_once_without_padding(llama):
    prompt_ids = [[*byte_tokenizer()(prompt + "\n").input_ids] for prompt in dict.fromkeys(ROWS["prompt"])]
    tokenizer = tokenizer_that_ends(llama, prompt_ids)
    expected = []
    for prompt in [*prompt_ids, prompt_ids[0]]:
        expected += prompt + generate_greedily(llama, tokenizer, [prompt], 12)[0]
    for batch_size in (1, 3):
        watch = Watch(llama)
        result = lm(max_new_tokens=12).evaluate(
            llama, tokenizer, rows(), batch_size=batch_size, set_token_mask=watch.set_token_mask
        )
        assert sorted(watch.counted) == sorted(expected)
        assert result.tokens == len(expected)


def test_batch_size_changes_nothing(llama):
    tokenizer = byte_tokenizer(bos=True)
    results = [
        lm(max_new_tokens=9).evaluate(llama, tokenizer, rows(), batch_size=size, set_token_mask=ignore)
        for size in (1, 2, 8)
    ]
    for result in results[1:]:
        assert result.samples == results[0].samples
        assert result.value == results[0].value
        assert result.extras["cross_entropy"] == pytest.approx(results[0].extras["cross_entropy"], abs=1e-5)


def test_progress_is_over_generation_and_loss(llama):
    calls = []
    lm(max_new_tokens=2).evaluate(
        llama,
        byte_tokenizer(),
        rows(),
        batch_size=3,
        set_token_mask=ignore,
        progress=lambda *call: calls.append(call),
    )
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_refusals(llama, monkeypatch):
    tokenizer = byte_tokenizer()
    with pytest.raises(ConfigError) as error:
        lm(context_length=64, max_new_tokens=63).evaluate(llama, tokenizer, rows(), batch_size=1, set_token_mask=ignore)
    assert str(error.value) == (
        "max_new_tokens=63 leaves no room for a prompt in context_length=64; lower max_new_tokens or raise "
        "context_length"
    )
    with pytest.raises(ConfigError, match="the tokenizer has no eos_token, so the end of a target cannot be"):
        lm().prepare(rows(), byte_tokenizer(eos=False))
    with pytest.raises(DataError, match="target_column='target' is not a column of the data; it has prompt; set"):
        lm().prepare(rows({"prompt": ["a"]}), tokenizer)
    with pytest.raises(DataError, match="target_column='target' holds int64, not text; columns of text: prompt"):
        lm().prepare(rows({"prompt": ["a"], "target": [1]}), tokenizer)
    with pytest.raises(DataError, match="row 1 has no value in column 'target'"):
        lm().prepare(rows({"prompt": ["a", "b"], "target": ["c", None]}), tokenizer)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(LTEError, match=r"pip install 'learn-to-be-efficient\[eval\]'"):
        lm().evaluate(llama, tokenizer, rows(), batch_size=1, set_token_mask=ignore)
