import errno
import json
import os
import random
import re

import pyarrow
import pytest
from pyarrow import parquet

from longred_megatron.data import documents
from longred_megatron.data.documents import find_files, read_documents
from longred_megatron.data.skipped import Skipped, named
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


def test_a_line_is_utf_8_with_or_without_a_mark_and_nothing_else(tmp_path):
    content = '{"text": "one"}\n{"text": "two"}\n'
    (tmp_path / "a.jsonl").write_text(content, encoding="utf-8-sig")
    assert texts(tmp_path / "a.jsonl") == ["one", "two"]
    (tmp_path / "b.jsonl").write_text(content, encoding="utf-16")
    with pytest.raises(UserError, match=r"b\.jsonl:1: not UTF-8"):
        texts(tmp_path / "b.jsonl")


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


def tally(folder, text_key="text"):
    """The texts of a folder, and what was skipped."""
    skipped = Skipped()
    files = find_files([folder], skipped)
    return [each.text for file in files for each in read_documents(file, text_key, skipped)], skipped


def compressed(path, content):
    with pyarrow.CompressedOutputStream(str(path), {".gz": "gzip", ".zst": "zstd"}[path.suffix]) as out:
        out.write(content)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_are_read(tmp_path, suffix):
    lines = "".join(json.dumps({"text": f"é {number}"}) + "\n" for number in range(3000)).encode()
    compressed(tmp_path / f"a.jsonl{suffix}", lines)
    compressed(tmp_path / f"b.TXT{suffix}", "\ufeffone\r\ntwo".encode())
    found, skipped = tally(tmp_path)
    assert found == [*(f"é {number}" for number in range(3000)), "one\r\ntwo"] and not skipped.bad
    path = tmp_path / f"a.jsonl{suffix}"
    assert sum(document.num_bytes for document in read_documents(path, "text")) == path.stat().st_size
    path.write_bytes(path.read_bytes() * 2)  # members one behind the other, as `cat` makes them
    assert len(texts(path)) == 6000


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_cut_and_foreign_compressed_files_are_named(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    compressed(path, b"".join(json.dumps({"text": random.randbytes(40).hex()}).encode() + b"\n" for _ in range(5000)))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found, skipped = tally(tmp_path)
    [kind] = skipped.bad.values()
    assert len(found) > 1000 and kind.places[0].startswith(f"{path}, all behind line {len(found)} (")
    path.write_bytes(b"nothing of the kind" * 10)
    with pytest.raises(UserError, match=rf"a\.jsonl\{suffix}: file that cannot be read"):
        texts(path)


@pytest.mark.parametrize("content", [b"0", b"\n"])
def test_files_that_unpack_without_end_are_left(tmp_path, monkeypatch, content):
    monkeypatch.setattr(documents, "UNPACKED_ALWAYS_BYTES", 1 << 18)
    compressed(tmp_path / "a.jsonl.zst", content * (1 << 22))
    with pytest.raises(UserError, match="unpacks to more than 200 times its size"):
        texts(tmp_path / "a.jsonl.zst")


def test_documents_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 1 << 20)
    good, long = b'{"text": "good"}\n', b'{"text": "' + b"1" * (1 << 20)
    (tmp_path / "a.jsonl").write_bytes(good + long * 3 + b'"}\n' + good + long)
    (tmp_path / "b.txt").write_bytes(b"1" * (1 << 20) + b"1")
    found, skipped = tally(tmp_path)
    assert found == ["good", "good"]
    assert skipped.bad[documents.TOO_LONG].places == [f"{tmp_path / 'a.jsonl'}:2", f"{tmp_path / 'a.jsonl'}:4"]
    assert skipped.bad["file that cannot be read"].places == [
        f"{tmp_path / 'b.txt'} (a document of more than 64 MiB; split it)"
    ]


def test_what_is_no_text_is_counted_and_named(tmp_path):
    (tmp_path / "good.jsonl").write_text('{"text": "good"}\n' * 9)
    (tmp_path / "bad.jsonl").write_text('{"text": null}\n{"text": 5}\n{"text": "last"}\n{}\n[\n')
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "nul.txt").write_bytes(b"\x7fELF\0\0")
    (tmp_path / "control.txt").write_bytes(bytes(range(1, 32)) * 10)
    (tmp_path / "README.md").write_text("")
    (tmp_path / "archive.tar.gz").write_text("")
    (tmp_path / "line\nend.txt").write_bytes(b"\0")
    found, skipped = tally(tmp_path)
    assert found == ["last", *["good"] * 9]
    skipped.check()
    counts = {kind: found.count for kind, found in skipped.bad.items()}
    assert counts == {
        "value that is no text": 2,
        "no key 'text'": 1,
        "not a line of JSON": 1,
        "not UTF-8": 1,
        "binary, not text": 3,
    }
    assert skipped.bad["value that is no text"].places == [
        f"{tmp_path}/bad.jsonl:1 (null)",
        f"{tmp_path}/bad.jsonl:2",
    ]
    assert any("line\\nend" in line for line in named(skipped.bad))
    assert skipped.others["file of another kind"].count == 2


def test_what_cannot_be_opened_is_counted_and_named(tmp_path, monkeypatch):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "broken.txt").symlink_to("absent")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "device.txt").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "fifo.txt")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "up").symlink_to("..")

    def scandir(path):
        if str(path).endswith("sub") and locked:
            raise PermissionError(errno.EACCES, "denied", str(path))
        return original(path)

    original, locked = os.scandir, False
    monkeypatch.setattr(os, "scandir", scandir)
    found, skipped = tally(tmp_path)
    assert found == ["good"] and list(skipped.others) == ["link to a folder, which is not followed"]
    [kind] = skipped.bad.values()
    assert kind.count == 4 and "broken.txt (a link to absent, which does not exist)" in kind.places[0]
    locked = True  # the tests may be root's, who may read all
    assert tally(tmp_path)[1].bad["folder that cannot be read"].places == [f"{tmp_path}/sub (no permission)"]
    with pytest.raises(UserError, match=r"5 of the first 6 documents are bad, .*folder that cannot be read .1.: "):
        tally(tmp_path)[1].check()
    with pytest.raises(UserError, match="broken link"):
        find_files([tmp_path])  # without a tally the first is an error


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a\0b.txt", "cannot be read .*null"),
        ("x" * 300 + ".txt", "a name of its path is too long"),
        ("good.txt/below.txt", "a folder of its path is a file"),
        ("loop.txt", "leads to itself"),
        ("dangling.txt", "a link to absent, which does not exist"),
        ("fifo.txt", "not a regular file, but a FIFO"),
    ],
)
def test_inputs_that_cannot_be(tmp_path, name, message):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "dangling.txt").symlink_to("absent")
    os.mkfifo(tmp_path / "fifo.txt")
    with pytest.raises(UserError, match=message):
        find_files([tmp_path / name])


def test_half_may_be_bad(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": 1}\n')
    tally(tmp_path)[1].check()
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(
        UserError, match=r"2 of the first 3 documents are bad.*The first: .*a\.jsonl:2: value that is no"
    ):
        tally(tmp_path)[1].check()


def test_a_wrong_key_is_not_read_to_the_end(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "good"}\n' * 1500)
    with pytest.raises(UserError, match=r"1,000 of the first 1,000 .* name the text's key with --text-key"):
        tally(tmp_path)


def test_damaged_rows_are_counted(tmp_path):
    path = tmp_path / "a.parquet"
    raw = pyarrow.array([b"good", b"\xff", b"a\0b"] + [b"good"] * 600, pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), len(raw), raw.buffers())
    parquet.write_table(pyarrow.table({"text": column}), path, row_group_size=100, compression="none")
    found, skipped = tally(tmp_path)
    assert found == ["good"] * 601 and set(skipped.bad) == {"not UTF-8", "binary, not text"}
    column = parquet.ParquetFile(path).metadata.row_group(4).column(0)
    whole, at = path.read_bytes(), column.dictionary_page_offset
    path.write_bytes(whole[:at] + b"\xff" * 30 + whole[at + 30 :])
    found, skipped = tally(tmp_path)
    [place] = skipped.bad["not a parquet file, or a damaged one"].places
    assert place.startswith(f"{path}, all behind row {len(found) + 2} (") and len(found) > 200
