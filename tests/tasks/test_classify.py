import pytest
import scipy.stats
import sklearn.metrics
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification

from lte.errors import ConfigError, DataError
from lte.tasks import ClassifyTask, TaskConfig
from lte.tasks.classify import f1, pearson, spearman, text_columns
from tests.tasks.tiny import VOCAB, Watch, byte_tokenizer, tiny_bert

TEXTS = ["a fine film", "dull", "it 's a charming and often affecting journey .", "no"]


def task(**values):
    return ClassifyTask(TaskConfig(name="classify", **values))


def rows(labels, **columns):
    return Dataset.from_dict({**(columns or {"sentence": TEXTS}), "label": labels})


def ignore(mask):
    pass


def test_integer_labels():
    kwargs = task().model_kwargs(rows([0, 2, 1, 0]), byte_tokenizer(classify=True))
    assert kwargs == {
        "num_labels": 3,
        "problem_type": "single_label_classification",
        "id2label": {0: "0", 1: "1", 2: "2"},
        "label2id": {"0": 0, "1": 1, "2": 2},
        "pad_token_id": VOCAB["<pad>"],
    }


def test_string_labels_are_sorted_and_remembered():
    tokenizer = byte_tokenizer(classify=True)
    classify = task()
    assert classify.model_kwargs(rows(["pos", "neg", "pos", "mid"]), tokenizer)["id2label"] == {
        0: "mid",
        1: "neg",
        2: "pos",
    }
    assert classify.prepare(rows(["pos", "neg", "neg", "pos"]), tokenizer)["labels"][:] == [2, 1, 1, 2]


def test_class_label_feature_names_the_classes():
    labelled = rows([0, 1, 1, 0]).cast_column("label", ClassLabel(names=["bad", "good", "odd"]))
    assert task().model_kwargs(labelled, byte_tokenizer())["id2label"] == {0: "bad", 1: "good", 2: "odd"}


def test_float_labels_mean_regression():
    tokenizer = byte_tokenizer(classify=True)
    scored = rows([5.0, 3.8, 0.0, 1.5])
    kwargs = task().model_kwargs(scored, tokenizer)
    assert kwargs == {"num_labels": 1, "problem_type": "regression", "pad_token_id": VOCAB["<pad>"]}
    batch = task().collator(tokenizer)(list(task().prepare(scored, tokenizer)))
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == pytest.approx([5.0, 3.8, 0.0, 1.5])


def test_prepared_pair_and_dynamic_padding():
    tokenizer = byte_tokenizer(classify=True)
    classify = task(context_length=12)
    pairs = rows([0, 1], sentence1=["ab", "a long first text"], sentence2=["c", "de"])
    prepared = classify.prepare(pairs, tokenizer)
    assert tokenizer.decode(prepared[0]["input_ids"]) == "[CLS]ab[SEP]c[SEP]"
    assert prepared[0]["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    assert len(prepared[1]["input_ids"]) == 12
    batch = classify.collator(tokenizer)(list(prepared))
    assert batch["input_ids"].shape == (2, 12)
    assert batch["attention_mask"][0].tolist() == [1] * 6 + [0] * 6
    assert batch["labels"].tolist() == [0, 1]
    assert batch["labels"].dtype == torch.long


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["sentence"], ["sentence"]),
        (["sentence2", "sentence1"], ["sentence1", "sentence2"]),
        (["question1", "question2"], ["question1", "question2"]),
        (["hypothesis", "premise"], ["premise", "hypothesis"]),
        (["sentence", "question"], ["question", "sentence"]),
        (["text", "other"], ["text"]),
        (["review"], ["review"]),
    ],
)
def test_text_columns_are_found(columns, expected):
    data = rows(["x"], **{name: ["a"] for name in columns})
    assert text_columns(TaskConfig(name="classify"), data) == expected


def test_text_columns_of_the_config():
    config = TaskConfig(name="classify", text_column="b", text_pair_column="a")
    assert text_columns(config, rows([0], a=["x"], b=["y"])) == ["b", "a"]


def one_by_one(model, tokenizer, texts):
    with torch.no_grad():
        return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])


@pytest.mark.parametrize("batch_size", [1, 3, 9])
def test_accuracy_by_hand(batch_size):
    tokenizer = byte_tokenizer(classify=True)
    model = tiny_bert(num_labels=3)
    logits = one_by_one(model, tokenizer, TEXTS)
    labels = logits.argmax(-1).tolist()
    labels[1] = (labels[1] + 1) % 3
    watch = Watch(model)
    result = task().evaluate(model, tokenizer, rows(labels), batch_size=batch_size, set_token_mask=watch.set_token_mask)
    assert (result.metric, result.value) == ("accuracy", 0.75)
    assert result.extras["loss"] == pytest.approx(F.cross_entropy(logits, torch.tensor(labels)).item(), abs=1e-5)
    everything = [token for text in TEXTS for token in tokenizer(text).input_ids]
    assert sorted(watch.counted) == sorted(everything)
    assert result.tokens == len(everything)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_regression_by_hand(batch_size):
    tokenizer = byte_tokenizer(classify=True)
    model = tiny_bert(num_labels=1, problem_type="regression")
    predicted = one_by_one(model, tokenizer, TEXTS).squeeze(-1)
    targets = [1.0, 2.5, 0.5, 4.0]
    result = task().evaluate(model, tokenizer, rows(targets), batch_size=batch_size, set_token_mask=ignore)
    assert result.metric == "pearson"
    assert result.value == pytest.approx(pearson(predicted.tolist(), targets), abs=1e-5)
    assert result.extras["loss"] == pytest.approx(((predicted - torch.tensor(targets)) ** 2).mean().item(), rel=1e-4)


def test_pearson_by_hand(caplog):
    assert pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(1.0)
    assert pearson([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert pearson([1, 1, 1], [1, 2, 3]) == 0.0
    assert "not defined for constant values" in caplog.text


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_those_of_scikit_learn_and_scipy(seed):
    generator = torch.Generator().manual_seed(seed)
    predicted, wanted = (torch.randint(0, 2, (50,), generator=generator).tolist() for _ in range(2))
    assert f1(predicted, wanted) == pytest.approx(sklearn.metrics.f1_score(wanted, predicted))
    assert pearson(predicted, wanted) == pytest.approx(sklearn.metrics.matthews_corrcoef(wanted, predicted))
    numbers, others = (torch.randint(0, 9, (50,), generator=generator).tolist() for _ in range(2))
    assert spearman(numbers, others) == pytest.approx(scipy.stats.spearmanr(numbers, others).statistic)
    assert f1([0, 0], [0, 0]) == 0.0


def test_metrics_that_go_with_the_labels():
    tokenizer, model = byte_tokenizer(classify=True), tiny_bert(num_labels=2)
    wanted = rows([0, 1, 1, 0])
    result = task(metric="matthews").evaluate(model, tokenizer, wanted, batch_size=4, set_token_mask=ignore)
    assert result.metric == "matthews"
    assert set(result.extras) == {"accuracy", "f1", "loss"}
    three = tiny_bert(num_labels=3)
    with pytest.raises(ConfigError, match="metric='f1' is not for labels that are 3 classes"):
        task(metric="f1").evaluate(three, tokenizer, wanted, batch_size=4, set_token_mask=ignore)


def test_string_labels_are_met_by_the_models_names():
    tokenizer = byte_tokenizer(classify=True)
    model = tiny_bert(id2label={0: "neg", 1: "pos"}, label2id={"neg": 0, "pos": 1})
    predicted = one_by_one(model, tokenizer, TEXTS).argmax(-1).tolist()
    names = [["neg", "pos"][number] for number in predicted]
    assert task().evaluate(model, tokenizer, rows(names), batch_size=2, set_token_mask=ignore).value == 1.0
    with pytest.raises(DataError) as error:
        task().evaluate(model, tokenizer, rows(["pos", "bad", "neg", "pos"]), batch_size=2, set_token_mask=ignore)
    assert str(error.value) == "label 'bad' of column 'label' is not one of the 2 classes: neg, pos"


def test_decoder_classifies_padded_batches():
    tokenizer = byte_tokenizer(pad=False)
    labelled = rows([0, 1, 1, 0])
    kwargs = task().model_kwargs(labelled, tokenizer)
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(VOCAB),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            **kwargs,
        )
    )
    results = [task().evaluate(model, tokenizer, labelled, batch_size=size, set_token_mask=ignore) for size in (1, 4)]
    assert results[0].extras["loss"] == pytest.approx(results[1].extras["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("labels", "settings", "message"),
    [
        (
            [0, 1, -1, 0],
            {},
            "row 2 has the label -1 in column 'label', which in GLUE marks rows without a label (its test "
            "splits); use a split with labels",
        ),
        ([0, 1, None, 0], {}, "row 2 has no value in column 'label'; remove the row or fill it in"),
        ([0, 0, 0, 0], {}, "column 'label' holds only 0; classification needs two different labels"),
        (["a"] * 4, {}, "column 'label' holds only 'a'; classification needs two different labels"),
        ([[1]] * 4, {}, "column 'label' holds [1]; labels are integers, strings or floats"),
        (
            [0, 1, 0, 1],
            {"label_column": "gold"},
            "label_column='gold' is not a column of the data; it has sentence, label; set label_column to one of them",
        ),
        (
            [0, 1, 0, 1],
            {"text_column": "review"},
            "text_column='review' is not a column of the data; it has sentence, label; set text_column to one of them",
        ),
    ],
)
def test_refused_data(labels, settings, message):
    with pytest.raises(DataError) as error:
        task(**settings).prepare(rows(labels), byte_tokenizer(classify=True))
    assert str(error.value) == message


def test_labels_the_model_cannot_take():
    tokenizer = byte_tokenizer(classify=True)
    for model, labels, message in (
        (
            tiny_bert(num_labels=2),
            [0, 1, 2, 0],
            "label 2 of column 'label' is not one of the 2 classes: LABEL_0, L",
        ),
        (
            tiny_bert(num_labels=2),
            [0.5] * 4,
            "column 'label' holds floats, but the model is for the classes LABEL_0",
        ),
        (
            tiny_bert(num_labels=1),
            ["a"] * 4,
            "column 'label' holds text, but the model does regression; give numbers",
        ),
    ):
        with pytest.raises(DataError) as error:
            task().evaluate(model, tokenizer, rows(labels), batch_size=2, set_token_mask=ignore)
        assert str(error.value).startswith(message)


def test_text_with_a_gap():
    with pytest.raises(DataError, match="row 1 has no value in column 'sentence'"):
        task().prepare(rows([0, 1], sentence=["a", None]), byte_tokenizer(classify=True))
