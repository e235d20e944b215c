import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from longred_megatron.errors import UserError
from longred_megatron.evaluation.texts import cut_windows, encoder_of, text_source
from tests.evaluation.conftest import byte_tokenizer

ENCODER = encoder_of(byte_tokenizer())
BOS, EOS = 0, 1


def source_of(folder: Path, *texts: str):
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return text_source([file])


def test_first_window_of_every_document_comes_before_a_second(tmp_path: Path) -> None:
    source = source_of(tmp_path, "a" * 25, "b" * 10, "c" * 9, "d" * 30)
    windows = cut_windows(source, ENCODER, window=10, num_windows=5, seed=0)
    assert [ENCODER.decode(row.tolist()) for row in windows.tokens] == [
        "a" * 10,
        "b" * 10,
        "d" * 10,
        "a" * 10,
        "d" * 10,
    ]
    assert windows.num_joined == 0
    assert windows.documents == (0, 1, 3, 0, 3) and windows.num_documents == 3


def test_short_documents_are_joined_only_where_whole_ones_do_not_suffice(tmp_path: Path) -> None:
    windows = cut_windows(source_of(tmp_path, "a" * 10, "bcd", "efg", "hij"), ENCODER, 10, 3, seed=0)
    assert windows.num_joined == 1
    assert windows.documents[0] == 0 > windows.documents[1]
    assert windows.tokens[0].tolist() == ENCODER.encode("a" * 10)
    assert windows.tokens[1].tolist() == [
        *ENCODER.encode("bcd"),
        EOS,
        *ENCODER.encode("efg"),
        EOS,
        *ENCODER.encode("hi"),
    ]


def test_windows_open_with_the_tokenizers_own_start_token(tmp_path: Path) -> None:
    encoder = encoder_of(byte_tokenizer(bos=True))
    windows = cut_windows(source_of(tmp_path, "x" * 30), encoder, 10, 4, seed=0)
    assert windows.tokens.shape == (3, 10)
    assert windows.tokens[:, 0].tolist() == [BOS] * 3
    assert BOS not in windows.tokens[:, 1:]
    assert ENCODER.start == ()
    assert encoder.fingerprint != ENCODER.fingerprint


def test_texts_too_short_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"too short.*gives 3 tokens, one window needs 10"):
        cut_windows(source_of(tmp_path, "abc"), ENCODER, 10, 1, seed=0)


def test_folders_are_searched_and_their_order_is_seeded(tmp_path: Path) -> None:
    for index in range(8):
        (tmp_path / f"{index}").mkdir()
        (tmp_path / f"{index}" / "t.txt").write_text(str(index), encoding="utf-8")
    (tmp_path / "skipped.md").write_text("no", encoding="utf-8")
    source = text_source([tmp_path])
    assert source.passed_over == (f"file of another kind (1): {tmp_path / 'skipped.md'}",)
    assert sorted(source.documents(0)) == [str(index) for index in range(8)]
    assert list(source.documents(0)) == list(source.documents(0)) != list(source.documents(1))


def test_parquet_and_the_texts_own_key(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"body": ["a", "b"]}), tmp_path / "a.parquet")
    assert list(text_source([tmp_path], text_key="body").documents(0)) == ["a", "b"]
    with pytest.raises(UserError, match=r"no column 'text' .*--text-key"):
        list(text_source([tmp_path]).documents(0))


def test_default_is_the_standard_library_and_says_so() -> None:
    source = text_source([])
    assert "standard library" in source.description
    assert not any("site-packages" in file.parts for file in source.files)
    assert any(file.name == "argparse.py" for file in source.files)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "does not exist"),
        ("a.pdf", "x", "its suffix is none of .txt, .jsonl, .parquet"),
        ("a.jsonl", "{}\n", "a.jsonl:1"),
        ("b.jsonl", '{"text": "a"}\nnot json\n', "b.jsonl:2"),
        ("empty", "folder", "no .txt, .jsonl, .parquet file found in it"),
    ],
)
def test_bad_text_files(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        list(text_source([path]).documents(0))


def test_reading_goes_on_until_as_many_windows_are_there_as_asked_for(tmp_path: Path) -> None:
    """Long documents give four windows each, however much of them is read; then there are more documents."""
    source = source_of(tmp_path, *(letter * 2000 for letter in "abcdefgh"))
    windows = cut_windows(source, ENCODER, window=10, num_windows=20, seed=0)
    assert len(windows.tokens) == 20 and windows.num_documents == 8
    assert len(cut_windows(source, ENCODER, window=10, num_windows=40, seed=0).tokens) == 32
