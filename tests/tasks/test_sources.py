import json

import datasets
import pytest
from datasets import Dataset, DatasetDict

from lte.errors import DataError
from lte.tasks import load_rows
from lte.tasks.sources import CONTINUES_COLUMN, read_documents


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_txt_documents_are_separated_by_exact_lines(tmp_path):
    path = write(
        tmp_path / "a.txt",
        "\nfirst\n\nstill first\n<|endoftext|>\nsecond <|endoftext|> same\n<|endoftext|>\n\n<|endoftext|>\nthird",
    )
    rows = load_rows(path)
    assert rows["text"][:] == ["first\n\nstill first", "second <|endoftext|> same", "third"]
    assert rows[CONTINUES_COLUMN][:] == [False, False, False]


def test_long_document_is_read_in_pieces_cut_at_line_ends(tmp_path):
    text = "".join(f"line number {number}\n" for number in range(100)) + "the end"
    pieces = list(read_documents(write(tmp_path / "a.txt", text), piece_chars=200))
    assert len(pieces) > 5
    assert "".join(piece for piece, _ in pieces) == text
    assert all(len(piece) <= 200 and piece.endswith("\n") for piece, _ in pieces[:-1])
    assert [continues for _, continues in pieces] == [True] * (len(pieces) - 1) + [False]


def test_pieces_of_one_endless_line(tmp_path):
    pieces = list(read_documents(write(tmp_path / "a.txt", "x" * 1000), piece_chars=300))
    assert [(len(piece), continues) for piece, continues in pieces] == [
        (300, True),
        (300, True),
        (300, True),
        (100, False),
    ]


def test_document_end_is_told_even_when_only_line_breaks_are_left(tmp_path):
    path = write(tmp_path / "a.txt", "x" * 19 + "\n\n\n<|endoftext|>\nnext")
    assert list(read_documents(path, piece_chars=20)) == [
        ("x" * 19 + "\n", True),
        ("", False),
        ("next", False),
    ]


def test_edited_txt_file_is_read_anew(tmp_path):
    path = write(tmp_path / "a.txt", "before")
    assert load_rows(path)["text"][:] == ["before"]
    write(path, "behind")
    assert load_rows(path)["text"][:] == ["behind"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"a": 1, "b": "x"}\n\n{"a": 2, "b": "y"}\n'),
        ("a.json", '[{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]'),
        ("a.csv", "a,b\n1,x\n2,y\n"),
    ],
)
def test_table_files(tmp_path, name, text):
    rows = load_rows(write(tmp_path / name, text))
    assert rows.to_list() == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]


def test_parquet_limit_and_dataset(tmp_path):
    rows = Dataset.from_dict({"a": [1, 2, 3]})
    rows.to_parquet(str(tmp_path / "a.parquet"))
    assert load_rows(tmp_path / "a.parquet", limit=2)["a"][:] == [1, 2]
    assert load_rows(rows, limit=9)["a"][:] == [1, 2, 3]


def test_folder_of_jsonl_with_splits(tmp_path):
    for name in ("train", "dev"):
        write(tmp_path / f"{name}.jsonl", json.dumps({"a": name}))
    write(tmp_path / "README.md", "no data")
    assert load_rows(tmp_path, split="train").to_list() == [{"a": "train"}]
    assert load_rows(str(tmp_path), split="validation").to_list() == [{"a": "dev"}]
    with pytest.raises(DataError, match=r"has the splits train, validation; set split to one of them"):
        load_rows(tmp_path)
    with pytest.raises(DataError, match=r"split='test' is not in .*; it has train, validation"):
        load_rows(tmp_path, split="test")


def test_folder_of_txt_with_splits(tmp_path):
    write(tmp_path / "train_part.txt", "t\n<|endoftext|>\nu")
    write(tmp_path / "validation.txt", "v")
    assert load_rows(tmp_path, split="train")["text"][:] == ["t", "u"]
    assert load_rows(tmp_path, split="validation")["text"][:] == ["v"]


def test_folder_of_plain_txt_is_one_split(tmp_path):
    write(tmp_path / "b.txt", "two")
    write(tmp_path / "a.txt", "one")
    assert load_rows(tmp_path)["text"][:] == ["one", "two"]


def test_saved_datasets(tmp_path):
    rows = Dataset.from_dict({"a": [1, 2]})
    rows.save_to_disk(tmp_path / "one")
    DatasetDict(train=rows, test=rows.select([1])).save_to_disk(tmp_path / "two")
    assert load_rows(tmp_path / "one")["a"][:] == [1, 2]
    assert load_rows(tmp_path / "two", split="test")["a"][:] == [2]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "a.txt: the file is empty"),
        ("a.jsonl", "", "a.jsonl: the file is empty"),
        ("a.txt", "\n\n", "a.txt: there are no rows in it"),
        ("a.jsonl", "\n\n", "a.jsonl: there are no rows in it"),
        ("a.json", "[]", "a.json: there are no rows in it"),
        ("a.csv", "a,b\n", "a.csv: there are no rows in it"),
        ("a.xls", "x", "a.xls: unsupported extension '.xls'; supported: .txt, .jsonl, .json, .csv, .parquet"),
        ("a.jsonl", '{"a": 1}\n{"a": ' + "[" * 50_000 + "]" * 50_000 + "}\n", "a.jsonl: line 2 is nested too deep"),
        ("a.jsonl", '{"a": 1}\n{"a": 2\n', "a.jsonl: line 2 is not valid JSON ("),
        ("a.jsonl", '{"a": 1}\n\n7\n', "a.jsonl: line 3 is not a JSON object; write one"),
        ("a.json", '[{"a": 1', "a.json: cannot be read as json: "),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "a.csv: cannot be read as csv: "),
        ("a.parquet", "abc", "a.parquet: cannot be read as parquet: "),
    ],
)
def test_unusable_files(tmp_path, capfd, name, text, message):
    with pytest.raises(DataError) as error:
        load_rows(write(tmp_path / name, text))
    assert str(error.value).startswith(f"{tmp_path}/{message}")
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 noir")
    with pytest.raises(DataError, match=r"a\.txt: is not UTF-8 text \(invalid continuation byte\); convert it"):
        load_rows(tmp_path / "a.txt")


def test_unusable_folders(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    write(tmp_path / "odd" / "a.xyz", "1")
    for name in ("empty", "odd"):
        with pytest.raises(DataError, match=rf"{name}: no readable data files: "):
            load_rows(tmp_path / name)


def test_split_of_a_single_file(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"a": 1}')
    with pytest.raises(DataError, match=r"split='train': .*a\.jsonl is one file and has no splits"):
        load_rows(path, split="train")


@pytest.mark.parametrize(
    "name",
    ["./data", "/no/where", "../up/data", "~/data", "data/sub/folder", "data.jsonl", "sub/data.txt", "a b"],
)
def test_missing_path_is_not_looked_for_on_the_hub(monkeypatch, name):
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(DataError) as error:
        load_rows(name)
    assert str(error.value) == f"{name}: no such file or folder"


@pytest.mark.parametrize(
    ("source", "expected"),
    [("glue:sst2", ("glue", "sst2")), ("org/some-set", ("org/some-set", None)), ("c4:en.x", ("c4", "en.x"))],
)
def test_hub_that_cannot_be_reached(monkeypatch, source, expected):
    asked = []

    def refuse(*args):
        asked.append(args)
        raise ConnectionError("Couldn't reach it\nat all")

    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
    with pytest.raises(DataError) as error:
        load_rows(source)
    assert asked == [expected]
    assert str(error.value) == (
        f"'{source}' is no file or folder here, and the Hugging Face hub gave no dataset of that name: "
        "Couldn't reach it at all; check the spelling (name or name:config), or the network"
    )


def test_hub_dataset(monkeypatch, write_jsonl):
    path = write_jsonl([{"a": 1}, {"a": 2}])
    builder = datasets.load_dataset_builder("json", data_files=str(path))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: builder)
    assert load_rows("org/name", split="train[:1]").to_list() == [{"a": 1}]


def test_no_noise_and_progress_bars_left_as_they_were(tmp_path, capfd):
    assert not datasets.are_progress_bars_disabled()
    load_rows(write(tmp_path / "a.jsonl", '{"a": 1}'))
    load_rows(write(tmp_path / "a.txt", "a"))
    assert not datasets.are_progress_bars_disabled()
    assert capfd.readouterr().err == ""
