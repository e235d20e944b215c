import json
import re

import pyarrow
import pytest
from pyarrow import parquet

from longred_megatron.data.documents import find_files, read_documents
from longred_megatron.errors import UserError


def texts(path, text_key="text"):
    return [document.text for document in read_documents(path, text_key)]


def test_folders_are_searched_to_the_bottom_in_order(tmp_path):
    names = ["b/2.txt", "b/10.jsonl", "a/x/y.parquet", "c.txt", "README.md", "b/.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    found = find_files([tmp_path / "c.txt", tmp_path / "b", tmp_path / "a"])
    assert found == [tmp_path / name for name in ("c.txt", "b/10.jsonl", "b/2.txt", "a/x/y.parquet")]


def test_all_bad_inputs_come_together(tmp_path):
    (tmp_path / "notes.md").write_text("text")
    (tmp_path / "good.txt").write_text("text")
    with pytest.raises(UserError) as raised:
        find_files([tmp_path / "absent", tmp_path / "notes.md", tmp_path, tmp_path / "good.txt"])
    absent, suffix, twice = raised.value.problems
    assert "absent does not exist" in absent
    assert "notes.md: its suffix is none of .txt, .jsonl, .parquet" in suffix
    assert "good.txt is given twice" in twice


def test_folders_of_other_files_hold_nothing(tmp_path):
    (tmp_path / "notes.md").write_text("text")
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "a.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no \.txt, \.jsonl, \.parquet file found"):
        find_files([tmp_path / "good", tmp_path / "empty"])


def test_txt_is_one_document_with_its_line_ends(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\n\r\n  two\u2028é\n".encode())
    assert texts(path) == ["one\r\n\r\n  two\u2028é\n"]
    path.write_bytes(b"abc\xff")
    with pytest.raises(UserError, match=re.escape(f"{path}: not UTF-8 (invalid start byte at byte 3)")):
        texts(path)


def test_jsonl_is_one_document_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = ["one\ntwo", "\u2028 é 😀", ""]
    path.write_text("\n \n".join(json.dumps({"body": row, "text": 1}, ensure_ascii=False) for row in rows))
    assert texts(path, "body") == rows
    assert sum(document.num_bytes for document in read_documents(path, "body")) <= path.stat().st_size


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "not a line of JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "not a line of JSON \\(maximum recursion depth"),
        (b'{"text": ' + b"1" * 100_000 + b"}", "not a line of JSON"),
        (b'["text"]', "no object \\(list\\); write it as"),
        (b'{"body": "a"}', "no key 'text' \\(its keys: 'body'\\); name the text's key with --text-key"),
        (b'{"text": null}', "no text \\(null\\)"),
        (b'{"text": 12}', "no text \\(int\\)"),
        (b'{"text": "\\u0000PNG"}', "binary, not text"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=f"{re.escape(str(path))}:3: .*{message}"):
        texts(path)


def test_parquet_is_one_document_a_row(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [f"row {number}" for number in range(600)]
    parquet.write_table(pyarrow.table({"id": range(600), "text": rows}), path, row_group_size=100)
    assert texts(path) == rows
    with pytest.raises(UserError, match=r"no column 'body' \(its columns: 'id', 'text'\)"):
        texts(path, "body")
    parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    with pytest.raises(UserError, match=r"a\.parquet: row 2: value that is no text \(null\)"):
        texts(path)
    path.write_text("nothing")
    with pytest.raises(UserError, match="not a parquet file"):
        texts(path)
