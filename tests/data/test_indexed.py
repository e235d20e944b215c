"""Damaged sets: every finding is one message that names the file."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from longred_megatron.data import indexed
from longred_megatron.data.indexed import file_mark, open_indexed
from longred_megatron.data.prepare import prepare
from longred_megatron.data.sequences import check_tokens
from longred_megatron.errors import UserError

LENGTHS = [3, 1, 4, 1, 5]
HEADER_BYTES = 34


@pytest.fixture
def prefix(tmp_path, write_indexed):
    return write_indexed(tmp_path / "set", [range(length) for length in LENGTHS])


def overwrite(path, at, content):
    whole = bytearray(Path(path).read_bytes())
    whole[at : at + len(content)] = content
    Path(path).write_bytes(whole)


def length_at(number):
    return HEADER_BYTES + 4 * number


def place_at(number):
    return length_at(len(LENGTHS)) + 8 * number


def border_at(number):
    return place_at(len(LENGTHS)) + 8 * number


@pytest.mark.parametrize(
    ("at", "content", "message"),
    [
        (9, struct.pack("<Q", 2), r"set\.idx has version 2, not 1"),
        (17, b"\x63", r"set\.idx has dtype code 99, which is no integer"),
        (17, b"\x07", "dtype code 7"),  # float32
        (18, struct.pack("<Q", 2**63), r"set\.idx has 142 bytes, its index expects 110680464442257309"),
        (length_at(1), struct.pack("<i", -1), r"set\.idx has a sequence of -1 tokens"),
        (length_at(1), struct.pack("<i", 2), r"set\.bin has 56 bytes, its index expects 60"),
        (length_at(1), struct.pack("<ii", 4, 1), "do not lie one behind the other"),  # the sum is the same
        (place_at(0), struct.pack("<q", -8), "do not lie one behind the other"),
        (place_at(3), struct.pack("<q", 2**62), "do not lie one behind the other"),
        (border_at(2), struct.pack("<q", 4), "borders do not ascend to 5"),
        (border_at(5), struct.pack("<q", 6), "borders do not ascend to 5"),
        (border_at(5), struct.pack("<q", 4), "borders do not ascend to 5"),
        (border_at(0), struct.pack("<q", -1), "borders do not ascend to 5"),
    ],
)
def test_a_damaged_index_is_named(prefix, at, content, message):
    overwrite(f"{prefix}.idx", at, content)
    with pytest.raises(UserError, match=message):
        open_indexed(prefix)


@settings(max_examples=150, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 141), st.integers(0, 255)), max_size=4), size=st.integers(0, 142))
def test_any_index_is_a_set_or_one_message(tmp_path_factory, changes, size):
    prefix = str(tmp_path_factory.getbasetemp() / "any")
    whole = bytearray(
        struct.pack("<9sQBQQ", indexed.INDEX_MAGIC, 1, 4, 5, 6)
        + np.array(LENGTHS, np.int32).tobytes()
        + np.cumsum([0, *LENGTHS[:-1]]).astype(np.int64).tobytes()
        + np.arange(6, dtype=np.int64).tobytes()
    )
    for at, value in changes:
        whole[at] = value
    Path(f"{prefix}.idx").write_bytes(whole[: size if len(changes) % 2 else None])
    Path(f"{prefix}.bin").write_bytes(bytes(4 * sum(LENGTHS)))
    try:
        assert len(open_indexed(prefix)) >= 1
    except UserError as error:
        assert f"{prefix}." in str(error)


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "set.bin/below"])
def test_paths_that_cannot_be(tmp_path, prefix, name):
    with pytest.raises(UserError, match="data prefix"):
        open_indexed(str(tmp_path / name))


def damage_inside_the_vocabulary(prefix):
    content = bytearray(Path(f"{prefix}.bin").read_bytes())
    content[0], content[2] = content[2], content[0]
    Path(f"{prefix}.bin").write_bytes(content)


def test_changed_tokens_are_found_by_their_mark(tmp_path, jsonl, sentencepiece_model):
    prefix = str(tmp_path / "set")
    vocab_size = prepare([jsonl], sentencepiece_model, Path(prefix)).vocab_size
    check_tokens(prefix, vocab_size)
    whole = Path(f"{prefix}.bin").read_bytes()
    damage_inside_the_vocabulary(prefix)
    with pytest.raises(UserError, match=r"set\.bin is not as it was written: now \d+ bytes with CRC-32"):
        check_tokens(prefix, vocab_size)
    Path(f"{prefix}.bin").write_bytes(whole)
    # Two lengths changed places: the index is whole in itself.
    index = IndexedDataset(prefix).index
    lengths = index.sequence_lengths.copy()[::-1]
    places = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64) * 2])
    overwrite(f"{prefix}.idx", HEADER_BYTES, lengths.tobytes() + places.tobytes())
    open_indexed(prefix)
    with pytest.raises(UserError, match=r"set\.idx is not as it was written"):
        check_tokens(prefix, vocab_size)


def test_sets_without_marks_go_on(tmp_path, jsonl, sentencepiece_model):
    prefix = str(tmp_path / "set")
    vocab_size = prepare([jsonl], sentencepiece_model, Path(prefix)).vocab_size
    report = json.loads(Path(f"{prefix}.json").read_text())
    del report["files"]
    Path(f"{prefix}.json").write_text(json.dumps(report))  # as an earlier version wrote it
    damage_inside_the_vocabulary(prefix)
    check_tokens(prefix, vocab_size)
    Path(f"{prefix}.json").unlink()  # as Megatron's own tools do
    check_tokens(prefix, vocab_size)


def test_large_files_are_marked_by_size_and_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed, "BLOCK_BYTES", 4)
    monkeypatch.setattr(indexed, "MAX_BLOCKS", 8)
    path = tmp_path / "set.bin"
    for size, sampled in ((0, []), (31, range(31)), (32, range(32)), (400, [0, 3, 396, 399])):
        path.write_bytes(bytes(size))
        mark = file_mark(path)
        assert mark["bytes"] == size and mark["blocks"] == min(8, -(-size // 4))
        for at in sampled:
            overwrite(path, at, b"\1")
            assert file_mark(path) != mark
            overwrite(path, at, b"\0")
    assert file_mark(path) == mark
    overwrite(path, 30, b"\1")  # between two blocks: not seen
    assert file_mark(path) == mark


@pytest.mark.parametrize(
    "content",
    [
        "[]", '"set"', "null", "3", "{}", "", "[" * 100_000,
        '{"vocab_size": 1e999}', '{"vocab_size": null}', '{"vocab_size": "300"}', '{"vocab_size": -1}',
        f'{{"vocab_size": {"9" * 5000}}}', '{"vocab_size": true}', '{"vocab_size": 300, "files": []}',
    ],
)  # fmt: skip
def test_a_damaged_report_is_one_message(prefix, content):
    Path(f"{prefix}.json").write_text(content)
    with pytest.raises(UserError, match=r"set\.json: no report of prepare_data") as raised:
        check_tokens(prefix, 300)
    assert len(str(raised.value)) < 600


def test_negative_tokens_of_other_tools_are_found(tmp_path, write_indexed):
    prefix = write_indexed(tmp_path / "set", [[1, 2], [3, -4]])
    with pytest.raises(UserError, match=r"set\.bin has a token -4"):
        check_tokens(prefix, 300)
