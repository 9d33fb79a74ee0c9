import logging

import pydantic
import pytest
from transformers import BertConfig, BloomConfig, GPT2Config, RobertaConfig

from lte.errors import ConfigError
from lte.tasks import PRESETS, ClassifyTask, LanguageTask, TaskConfig, build_task, fit_context, model_positions


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"name": "lm", "contxt_length": 3},
            "task: unknown key 'contxt_length'; did you mean 'context_length'?",
        ),
        ({"name": "lm", "zzz": 3}, "task: unknown key 'zzz'; known keys: name, context_length, stride"),
        ({}, "task: name is missing"),
        ({"name": "squad"}, "unknown task 'squad'; known tasks: lm, classify, cola, "),
        (
            {"name": "lm", "context_length": 1},
            "task: context_length=1: Input should be greater than or equal to 2",
        ),
        ({"name": "lm", "limit": 0}, "task: limit=0: Input should be greater than or equal to 1"),
        (
            {"name": "lm", "context_length": 8, "stride": 8},
            "stride=8 must be below context_length=8, or the first token of a window would have no context; "
            "choose at most 7",
        ),
        (
            {"name": "lm", "prompt_column": "q"},
            "prompt_column='q' needs target_column; give both or neither",
        ),
        (
            {"name": "lm", "target_column": "a"},
            "target_column='a' needs prompt_column; give both or neither",
        ),
        (
            {"name": "classify", "prompt_column": "q", "target_column": "a"},
            "prompt_column='q' is not used together with name='classify'; leave it out",
        ),
        (
            {"name": "lm", "text_pair_column": "b"},
            "text_pair_column='b' is not used together with name='lm'; leave it out",
        ),
        (
            {"name": "classify", "text_pair_column": "b"},
            "text_pair_column='b' needs text_column; give both",
        ),
        (
            {"name": "lm", "prompt_column": "q", "target_column": "a", "text_column": "t"},
            "text_column='t' is not used together with prompt_column; leave it out",
        ),
        ({"name": "lm", "input_column": "i"}, "input_column='i' needs prompt_column and target_column; give all"),
        ({"name": "lm", "metric": "bleu"}, "metric='bleu' is not of this task, lm: its metric is perplexity"),
        ({"name": "cola", "metric": "bleu"}, "metric='bleu' is not of this task, classify: its metric is one of acc"),
        (
            {"name": "lm", "messages_column": "m", "text_column": "t"},
            "text_column='t' is not used together with messages_column; leave it out",
        ),
    ],
)
def test_refused_settings(values, message):
    with pytest.raises(ConfigError) as error:
        TaskConfig(**values)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_error_inside_a_larger_config_keeps_its_text():
    class Recipe(pydantic.BaseModel):
        task: TaskConfig

    with pytest.raises(pydantic.ValidationError, match="unknown key 'strid'; did you mean 'stride'"):
        Recipe.model_validate({"task": {"name": "lm", "strid": 1}})


def test_stride_defaults_to_half():
    assert TaskConfig(name="lm", context_length=10).window_stride == 5
    assert TaskConfig(name="lm", context_length=10, stride=3).window_stride == 3


def test_context_is_clipped_with_a_logged_line(caplog):
    config = TaskConfig(name="lm", context_length=512, stride=200)
    with caplog.at_level(logging.WARNING):
        fitted = fit_context(config, GPT2Config(n_positions=128))
    assert (fitted.context_length, fitted.stride) == (128, 64)
    assert "context_length=512 is more than the model's 128 positions; using 128" in caplog.text
    assert "stride=200 does not fit either; using 64" in caplog.text


def test_context_that_fits_is_kept_without_a_line(caplog):
    config = TaskConfig(name="lm", context_length=128)
    assert fit_context(config, GPT2Config(n_positions=128)) is config
    assert not caplog.text


def test_model_positions():
    assert model_positions(BertConfig(max_position_embeddings=512)) == 512
    assert model_positions(RobertaConfig(max_position_embeddings=514, pad_token_id=1)) == 512
    assert model_positions(BloomConfig()) is None


def test_build_task():
    assert isinstance(build_task(TaskConfig(name="lm")), LanguageTask)
    assert isinstance(build_task(TaskConfig(name="classify")), ClassifyTask)
    task = build_task(TaskConfig(name="lm"), GPT2Config(n_positions=64))
    assert task.config.context_length == 64


def test_a_task_by_name_is_settings_that_others_win_over():
    cola = TaskConfig(name="cola", context_length=64)
    assert cola == TaskConfig(name="classify", text_column="sentence", metric="matthews", context_length=64)
    assert TaskConfig(name="e2e", metric="bleu").metric == "bleu"
    assert {build_task(TaskConfig(name=name)).config.name for name in PRESETS} == {"lm", "classify"}
