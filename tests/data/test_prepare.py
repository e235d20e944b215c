import errno
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from longred_megatron.data import encoding
from longred_megatron.data import prepare as prepare_module
from longred_megatron.data.prepare import prepare
from longred_megatron.data.sequences import IndexedSequences, SequenceSource, check_tokens
from longred_megatron.data.tokenizer import load_tokenizer
from longred_megatron.errors import UserError


def documents_of(prefix):
    dataset = IndexedDataset(str(prefix))
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    return [dataset[index].tolist() for index in range(len(dataset))]


def digests_of(prefix):
    return {
        suffix: hashlib.sha256(prefix.with_suffix(suffix).read_bytes()).hexdigest()
        for suffix in (".bin", ".idx", ".json")
    }


@pytest.mark.parametrize("tokenizer", ["sentencepiece_model", "hf_tokenizer"])
def test_documents_and_report(request, tmp_path, corpus, jsonl, tokenizer):
    path = request.getfixturevalue(tokenizer)
    (tmp_path / "more.txt").write_text("a document of its own")
    report = prepare([jsonl, tmp_path / "more.txt"], path, tmp_path / "sets" / "all")
    tokenizer = load_tokenizer(path)
    documents = documents_of(tmp_path / "sets" / "all")
    assert [document[-1] for document in documents] == [tokenizer.end_of_document] * len(documents)
    assert [tokenizer.decode(document[:-1]) for document in documents] == [*corpus, "a document of its own"]
    assert report.documents_kept == len(documents) and report.documents_dropped == 0
    assert report.tokens == sum(map(len, documents))
    assert report.dtype == IndexedDataset(str(tmp_path / "sets" / "all")).index.dtype.__name__ == "uint16"
    stored = json.loads((tmp_path / "sets" / "all.json").read_text())
    assert stored["vocab_size"] == tokenizer.vocab_size
    assert stored["end_of_document"] == tokenizer.end_of_document
    assert stored["tokenizer"] == str(path) and stored["tokenizer_sha256"]
    assert stored["documents_kept"] == len(documents) and stored["tokens"] == report.tokens
    # What comes out is what training reads.
    check_tokens(str(tmp_path / "sets" / "all"), tokenizer.vocab_size)
    assert SequenceSource(IndexedSequences, {str(tmp_path / "sets" / "all"): 1.0}, 64, seed=0)[0].shape == (65,)


def test_histogram_counts_documents_by_powers_of_two(tmp_path, jsonl, sentencepiece_model):
    report = prepare([jsonl], sentencepiece_model, tmp_path / "set")
    lengths = np.array([len(document) for document in documents_of(tmp_path / "set")])
    bounds = [each.up_to_tokens for each in report.lengths]
    for bucket in report.lengths:
        inside = (lengths <= bucket.up_to_tokens) & (lengths > bucket.up_to_tokens // 2)
        assert (bucket.documents, bucket.tokens) == (inside.sum(), lengths[inside].sum())
    assert bounds == sorted(set(bounds)) and len(bounds) > 2
    assert sum(each.documents for each in report.lengths) == len(lengths)
    assert f"{len(lengths):,} documents kept" in report.summary()


def test_short_and_empty_documents_are_dropped(tmp_path, sentencepiece_model):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * size}) + "\n" for size in (0, 40, 1, 80)))
    tokenizer = load_tokenizer(sentencepiece_model)
    limit = len(tokenizer.encode("x" * 40))  # the end of document does not help
    report = prepare([path], sentencepiece_model, tmp_path / "long", min_tokens=limit)
    assert (report.documents_kept, report.documents_dropped) == (2, 2)
    assert prepare([path], sentencepiece_model, tmp_path / "all").documents_dropped == 1
    with pytest.raises(UserError, match="no document kept: 4 read, each with fewer than 1000 tokens"):
        prepare([path], sentencepiece_model, tmp_path / "none", min_tokens=1000)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="no document kept: 0 read"):
        prepare([tmp_path / "empty.jsonl"], sentencepiece_model, tmp_path / "none")
    assert not list(tmp_path.glob("*none*"))


def test_workers_change_nothing(tmp_path, monkeypatch, jsonl, sentencepiece_model):
    monkeypatch.setattr(encoding, "CHUNK_DOCUMENTS", 2)  # more chunks than may be under way
    prepare([jsonl], sentencepiece_model, tmp_path / "one")
    prepare([jsonl], sentencepiece_model, tmp_path / "two", workers=2)
    assert digests_of(tmp_path / "one") == digests_of(tmp_path / "two")


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path, monkeypatch, jsonl, sentencepiece_model):
    large = load_tokenizer(sentencepiece_model)
    large.vocab_size = 100_000
    monkeypatch.setattr(prepare_module, "load_tokenizer", lambda _: large)
    assert prepare([jsonl], sentencepiece_model, tmp_path / "set").dtype == "int32"


def test_a_set_is_replaced_only_on_demand(tmp_path, jsonl, sentencepiece_model):
    prefix = tmp_path / "set"
    prepare([jsonl], sentencepiece_model, prefix)
    before = digests_of(prefix)
    (tmp_path / "other.txt").write_text("other text")
    with pytest.raises(UserError, match=r"set\.bin.*set\.json.*set\.idx: already there.*--overwrite"):
        prepare([tmp_path / "other.txt"], sentencepiece_model, prefix)
    assert digests_of(prefix) == before
    assert prepare([tmp_path / "other.txt"], sentencepiece_model, prefix, overwrite=True).documents_kept == 1
    assert len(documents_of(prefix)) == 1


def test_a_failure_leaves_what_was_there(tmp_path, jsonl, sentencepiece_model):
    prefix = tmp_path / "out" / "set"
    prepare([jsonl], sentencepiece_model, prefix)
    before = digests_of(prefix)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "good"}\n{"text": 3}\n{"text": 4}\n')
    with pytest.raises(
        UserError,
        match=r"2 of the first 3 documents are bad.*value that is no text .2.: .*bad\.jsonl:2 \(int\), .*:3\.",
    ):
        prepare([bad], sentencepiece_model, prefix, overwrite=True)
    assert digests_of(prefix) == before
    assert len(list(prefix.parent.iterdir())) == 3  # nothing half written is left beside it


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_was_skipped_is_in_the_report_and_the_summary(tmp_path, jsonl, sentencepiece_model):
    (tmp_path / "in").mkdir()
    jsonl.rename(tmp_path / "in" / "texts.jsonl")
    (tmp_path / "in" / "bad.txt").write_bytes(b"\xff")
    (tmp_path / "in" / "notes.md").write_text("")
    report = prepare([tmp_path / "in"], sentencepiece_model, tmp_path / "set")
    bad, notes = tmp_path / "in" / "bad.txt", tmp_path / "in" / "notes.md"
    assert f"skipped: not UTF-8 (1): {bad} (invalid start byte at byte 0)\n" in report.summary()
    assert report.summary().endswith(f"passed over: file of another kind (1): {notes}")
    stored = json.loads((tmp_path / "set.json").read_text())
    assert stored["skipped"] == {
        "not UTF-8": {"count": 1, "places": [f"{bad} (invalid start byte at byte 0)"]},
    }
    assert stored["passed_over"] == {"file of another kind": {"count": 1, "places": [str(notes)]}}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 300, "cannot be written .a name of its path is too long"),
        ("a\0b", "cannot be written"),
        ("texts.jsonl/set", "cannot be written .a folder of its path is a file"),
        ("..", "names no set"),
    ],
)
def test_the_output_is_tried_first(tmp_path, monkeypatch, jsonl, name, message):
    monkeypatch.setattr(prepare_module, "load_tokenizer", lambda _: pytest.fail("the work has begun"))
    before = names(tmp_path)
    with pytest.raises(UserError, match=rf"--output .*{message}"):
        prepare([jsonl], tmp_path / "absent", tmp_path / name)
    assert names(tmp_path) == before


@pytest.mark.parametrize("setting", [{"workers": 1_000_000}, {"min_tokens": 10**15}, {"workers": -1}])
def test_settings_past_their_bounds(tmp_path, jsonl, setting):
    with pytest.raises(UserError, match=r"is -?\d+; give at least 1 and at most \d+"):
        prepare([jsonl], tmp_path / "absent", tmp_path / "set", **setting)


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, jsonl, sentencepiece_model, suffix):
    prefix = tmp_path / "out" / "set"
    prepare([jsonl], sentencepiece_model, prefix)
    before = digests_of(prefix)

    def full(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    if suffix == ".bin":
        monkeypatch.setattr(IndexedDatasetBuilder, "add_document", full)
    elif suffix == ".idx":
        monkeypatch.setattr(IndexedDatasetBuilder, "finalize", full)
    else:
        monkeypatch.setattr(type(prefix), "write_text", full)
    with pytest.raises(UserError, match=r"--output .*out/set: cannot be written \(the disk is full\)"):
        prepare([jsonl], sentencepiece_model, prefix, overwrite=True)
    assert names(prefix.parent) == ["set.bin", "set.idx", "set.json"] and digests_of(prefix) == before


@pytest.mark.parametrize("exception", [SystemExit, KeyboardInterrupt])
def test_an_end_from_outside_leaves_nothing(tmp_path, monkeypatch, jsonl, sentencepiece_model, exception):
    def ended(*_arguments):
        raise exception

    monkeypatch.setattr(IndexedDatasetBuilder, "add_document", ended)
    (tmp_path / "out").mkdir()
    with pytest.raises(exception):
        prepare([jsonl], sentencepiece_model, tmp_path / "out" / "set")
    assert names(tmp_path / "out") == []


class Killed(BaseException):
    """What nothing is done after."""


def killed_at(monkeypatch, number):
    """Ends the process, as far as one can tell, at its move number 1, 2, 3 of a file."""
    moves = iter(range(1, 100))

    def replace(self, target):
        if self.parent.name == ".set.partial" and next(moves) == number:
            raise Killed
        return original(self, target)

    original = Path.replace
    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(prepare_module, "_clear_halves", lambda *_: None)
    monkeypatch.setattr(prepare_module, "remove_unfinished", lambda _: None)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_what_a_killed_run_left_goes_with_the_next(tmp_path, jsonl, sentencepiece_model, number):
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, number)
        prepare([jsonl], sentencepiece_model, out / "set")
    assert names(out) == [".set.partial", *["set.bin", "set.json"][: number - 1]]
    with pytest.raises(UserError, match="does not exist"):  # even if the next fails
        prepare([jsonl], tmp_path / "absent", out / "set")
    assert names(out) == []
    prepare([jsonl], sentencepiece_model, out / "set")
    assert names(out) == ["set.bin", "set.idx", "set.json"]


def test_what_is_the_users_stays(tmp_path, jsonl, sentencepiece_model):
    (tmp_path / ".set.partial").mkdir()
    (tmp_path / ".set.partial" / "mine").write_text("mine")
    with pytest.raises(UserError, match=r"\.set\.partial: was not made by this program"):
        prepare([jsonl], sentencepiece_model, tmp_path / "set")
    assert (tmp_path / ".set.partial" / "mine").read_text() == "mine"
    (tmp_path / "other.bin").mkdir()
    with pytest.raises(UserError, match=r"other\.bin: in the way, and no file"):
        prepare([jsonl], sentencepiece_model, tmp_path / "other", overwrite=True)


def test_two_runs_do_not_write_one_set(tmp_path, monkeypatch, jsonl, sentencepiece_model):
    def finalize(self, index):
        with pytest.raises(UserError, match="another prepare_data is writing this set"):
            prepare([jsonl], sentencepiece_model, tmp_path / "set")
        original(self, index)

    original = IndexedDatasetBuilder.finalize
    monkeypatch.setattr(IndexedDatasetBuilder, "finalize", finalize)
    prepare([jsonl], sentencepiece_model, tmp_path / "set")
    assert names(tmp_path) == ["set.bin", "set.idx", "set.json", "texts.jsonl"]


def test_a_signal_at_any_line_leaves_nothing(tmp_path, jsonl, sentencepiece_model):
    """At each line that runs from the first look at the output to the first move into place, one after the other."""
    files = {prepare_module.__file__, prepare_module.begin_folder.__code__.co_filename}
    cleaning = {"try_output", "_clear_halves", "remove_unfinished", "_remove", "_remove_empty"}
    lines = 0

    def interrupted_at(line):
        countdown = line

        def trace(frame, event, argument):
            nonlocal countdown
            if frame.f_code.co_filename not in files or frame.f_code.co_name in cleaning:
                return None
            if event == "line":
                if frame.f_code.co_name == "_move":
                    countdown = -1
                countdown -= 1
                if countdown == 0:
                    sys.settrace(None)
                    raise SystemExit(f"{frame.f_code.co_name}:{frame.f_lineno}")
            return trace

        sys.settrace(trace)
        try:
            prepare([jsonl], sentencepiece_model, tmp_path / "out" / "set")
        except SystemExit as stop:
            return str(stop)
        finally:
            sys.settrace(None)
        return ""

    while place := interrupted_at(lines + 1):
        lines += 1
        assert not (tmp_path / "out").exists(), place
    assert lines > 60 and (tmp_path / "out" / "set.idx").exists()
