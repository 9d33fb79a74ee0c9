import math

import pytest
import torch
from datasets import Dataset

from lte.errors import DataError
from lte.tasks import LanguageTask, TaskConfig
from lte.tasks.chat import DEFAULT_TEMPLATE
from lte.tasks.collate import IGNORED
from tests.tasks.tiny import Watch, byte_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
)
# puts more into the generation prompt than a finished turn holds, as templates of reasoning models do
THINKING = CHATML.replace("<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>\n{% endif")
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello é"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": " See you\nsoon"},
]


def chats(*talks):
    return Dataset.from_dict({"messages": list(talks or [TALK])})


def lm(**values):
    return LanguageTask(TaskConfig(name="lm", **values))


def learned(tokenizer, row):
    return tokenizer.decode([label for label in row["labels"] if label != IGNORED])


@pytest.mark.parametrize("template", [CHATML, MARKED, THINKING], ids=["plain", "marked", "thinking"])
def test_labels_are_exactly_what_the_assistant_says(template):
    tokenizer = byte_tokenizer(chat_template=template)
    row = lm().prepare(chats(), tokenizer)[0]
    assert learned(tokenizer, row) == "Hello é<|im_end|> See you\nsoon<|im_end|>"
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(TALK, tokenize=False)
    kept = [(token, label) for token, label in zip(row["input_ids"], row["labels"], strict=True)]
    assert all(label in (token, IGNORED) for token, label in kept)


@pytest.mark.parametrize("bos", [False, True])
def test_default_template(bos):
    tokenizer = byte_tokenizer(bos=bos)
    row = lm().prepare(chats(TALK[1:3]), tokenizer)[0]
    start = "<s>" if bos else ""
    assert tokenizer.decode(row["input_ids"]) == f"{start}User:\nHi\n\nAssistant:\nHello é</s>\n\n"
    assert learned(tokenizer, row) == "Hello é</s>"
    assert "generation" in DEFAULT_TEMPLATE


def test_turn_without_special_end_token_keeps_its_line_break():
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = byte_tokenizer(chat_template=template)
    row = lm().prepare(chats(), tokenizer)[0]
    assert learned(tokenizer, row) == "Hello é\n See you\nsoon\n"


def test_assistant_first():
    tokenizer = byte_tokenizer(chat_template=CHATML)
    row = lm().prepare(chats([{"role": "assistant", "content": "Hi"}, *TALK[1:3]]), tokenizer)[0]
    assert learned(tokenizer, row).endswith("Hi<|im_end|>Hello é<|im_end|>")


def test_long_chat_is_cut_at_the_end_and_dropped_without_an_answer(caplog):
    tokenizer = byte_tokenizer()
    silent = [{"role": "user", "content": "x" * 50}, {"role": "assistant", "content": "never seen"}]
    prepared = lm(context_length=24).prepare(chats(silent, TALK[1:3]), tokenizer)
    assert len(prepared) == 1
    assert len(prepared[0]["input_ids"]) == 24
    assert learned(tokenizer, prepared[0]) == "Hello"[: 24 - len("User:\nHi\n\nAssistant:\n")]
    assert "left out 1 of 2 conversations: no assistant's turn within" in caplog.text
    with pytest.raises(DataError) as error:
        lm(context_length=24).prepare(chats(silent), tokenizer)
    assert str(error.value) == (
        "none of the 1 conversations has an assistant's turn within context_length=24 tokens; give other "
        "rows or a larger context_length"
    )


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexity_of_the_assistants_tokens(llama, batch_size):
    tokenizer = byte_tokenizer(chat_template=CHATML)
    rows = chats(TALK, TALK[1:3], TALK[3:])
    watch = Watch(llama)
    result = lm().evaluate(llama, tokenizer, rows, batch_size=batch_size, set_token_mask=watch.set_token_mask)
    counted = list(watch.counted)
    loss = count = 0
    everything = []
    for row in lm().prepare(rows, tokenizer):
        labels = torch.tensor([row["labels"]])
        n_labels = int((labels != IGNORED).sum())
        loss += llama(torch.tensor([row["input_ids"]]), labels=labels).loss.item() * n_labels
        count += n_labels
        everything += row["input_ids"]
    assert result.metric == "perplexity"
    assert result.extras["cross_entropy"] == pytest.approx(loss / count, abs=1e-5)
    assert result.value == pytest.approx(math.exp(loss / count), rel=1e-4)
    assert sorted(counted) == sorted(everything)
    assert result.tokens == len(everything)


def test_other_column_name_and_text_beside_messages():
    tokenizer = byte_tokenizer()
    rows = Dataset.from_dict({"talk": [TALK], "text": ["plain text"]})
    assert learned(tokenizer, lm(messages_column="talk").prepare(rows, tokenizer)[0]).startswith("Hello")
    rows = rows.rename_column("talk", "messages")
    assert "attention_mask" not in lm(text_column="text", context_length=4).prepare(rows, tokenizer).column_names


@pytest.mark.parametrize(
    ("columns", "template", "message"),
    [
        (
            {"a": ["x"]},
            None,
            "messages_column='talk' is not a column of the data; it has a; set messages_column",
        ),
        ({"talk": [[]]}, None, "row 0: talk must be a list of messages, got []"),
        ({"talk": ["hello"]}, None, "row 0: talk must be a list of messages, got 'hello'"),
        (
            {"talk": [[{"role": "user"}]]},
            None,
            "row 0: a message of talk needs a role and a content, got {'role'",
        ),
        (
            {"talk": [TALK]},
            "{{ raise_exception('roles must alternate') }}",
            "row 0: the chat template cannot take these messages: roles must alternate",
        ),
        (
            {"talk": [TALK]},
            "{% for m in messages %}{{ m.role }}{{ loop.revindex }}{{ m.content }}{% endfor %}",
            "row 0: the chat template cannot take these messages: message 2 is rendered differently when "
            "others follow it, so the assistant's words cannot be told from the rest; use a template with "
            "{% generation %} marks",
        ),
    ],
)
def test_refusals(columns, template, message):
    with pytest.raises(DataError) as error:
        lm(messages_column="talk").prepare(Dataset.from_dict(columns), byte_tokenizer(chat_template=template))
    assert str(error.value).startswith(message)
