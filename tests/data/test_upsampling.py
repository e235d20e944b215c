"""Long documents up to a share of the tokens: properties of the counts, and the set that comes of them."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from longred_megatron.data.prepare import prepare
from longred_megatron.data.sequences import without_start_token
from longred_megatron.data.upsampling import LongShare, repeats, upsampled
from longred_megatron.errors import UserError
from tools.prepare_data import main


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=80).filter(lambda lengths: max(lengths) >= 100),
    st.floats(0.05, 0.95),
)
def test_the_share_is_reached_and_long_documents_are_repeated_alike(lengths: list[int], share: float) -> None:
    of = np.array(lengths)
    counts = repeats(of, LongShare(share, long_tokens=100, max_copies=1000))
    is_long = of >= 100
    assert (counts >= 0).all() and not counts[~is_long].any()
    assert counts[is_long].max() - counts[is_long].min() <= 1
    long, short = int((of * (1 + counts))[is_long].sum()), int(of[~is_long].sum())
    if of[is_long].sum() >= share * of.sum():
        assert not counts.any()
    else:  # what is missing or too much is less than a document
        assert abs(long - share * short / (1 - share)) <= of.max()
    account = upsampled(of, counts, LongShare(share, 100))
    assert account.share == pytest.approx(long / (long + short))
    assert account.most_copies == 1 + counts.max()


def test_the_last_round_is_spread() -> None:
    counts = repeats(np.array([10] * 20 + [200]), LongShare(0.6, long_tokens=10, max_copies=9))  # all are long
    assert not counts.any()
    counts = repeats(np.array([10] * 20 + [9] * 50), LongShare(0.4, long_tokens=10, max_copies=9))
    assert counts.tolist()[:20] == [0, 1] * 10 and not counts[20:].any()


def test_more_copies_than_allowed_are_refused() -> None:
    lengths = np.array([100, 10, 10, 10, 10])  # 100 long tokens beside 40 short ones
    assert repeats(lengths, LongShare(0.9, 100, max_copies=4)).tolist() == [3, 0, 0, 0, 0]
    with pytest.raises(UserError, match=r"long documents are 71\.4% of the tokens, 3 copies of each make 88\.2%"):
        repeats(lengths, LongShare(0.9, 100, max_copies=3))
    with pytest.raises(UserError, match="no document has 101 tokens or more"):
        repeats(lengths, LongShare(0.9, 101))


def documents_of(prefix: Path) -> list[tuple[int, ...]]:
    dataset = IndexedDataset(str(prefix))
    return [tuple(dataset[i].tolist()) for i in range(len(dataset))]


def test_a_set_holds_every_document_and_its_copies_behind_them(
    tmp_path: Path, jsonl: Path, sentencepiece_model: Path
) -> None:
    plain = prepare([jsonl], sentencepiece_model, tmp_path / "plain")
    lengths = [len(document) for document in documents_of(tmp_path / "plain")]
    limit = sorted(lengths)[-5]
    wanted = LongShare(0.7, limit, 10)
    report = prepare([jsonl], sentencepiece_model, tmp_path / "long", long_share=wanted)
    once, more = documents_of(tmp_path / "plain"), documents_of(tmp_path / "long")
    assert more[: len(once)] == once
    counts = repeats(np.array(lengths), wanted)
    assert Counter(more) == Counter({document: 1 + int(n) for document, n in zip(once, counts, strict=True)})
    assert report.documents_kept == plain.documents_kept == len(once)
    assert report.tokens == sum(map(len, more)) > plain.tokens
    assert report.upsampling is not None and report.upsampling.repeated_documents == int((counts > 0).sum())
    long_tokens = sum(len(document) for document in more if len(document) >= limit)
    assert report.upsampling.share == pytest.approx(long_tokens / report.tokens)
    assert report.upsampling.share == pytest.approx(0.7, abs=max(lengths) / report.tokens)
    assert report.upsampling.summary() in report.summary()
    again = prepare([jsonl], sentencepiece_model, tmp_path / "again", long_share=wanted, workers=2)
    assert again.files == report.files


def test_a_start_token_where_the_tokenizer_puts_one(tmp_path: Path, jsonl: Path, bos_tokenizer: Path) -> None:
    main(
        ["--input", str(jsonl), "--tokenizer", str(bos_tokenizer), "--output", str(tmp_path / "without"), "--workers=1"]
    )
    more = ("--bos", "--min-tokens", "3", "--workers", "2")
    main(["--input", str(jsonl), "--tokenizer", str(bos_tokenizer), "--output", str(tmp_path / "with"), *more])
    without = [document for document in documents_of(tmp_path / "without") if len(document) >= 4]
    assert documents_of(tmp_path / "with") == [(0, *document) for document in without]
    assert without_start_token(str(tmp_path / "without")) and not without_start_token(str(tmp_path / "with"))
    assert not without_start_token(str(tmp_path / "none"))
    reports = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("without", "with")]
    assert [(each["start_token"], each["starts_documents"]) for each in reports] == [(0, False), (0, True)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bos"], "--bos: the tokenizer .* puts no start token"),
        (["--long-tokens", "100"], "no effect without --long-share"),
        (["--long-share", "1"], "--long-share 1: must be between 0 and 1"),
        (["--long-share", "nan"], "--long-share nan: must be between 0 and 1"),
        (["--long-share", "0.5", "--long-tokens", "0", "--max-copies", "0"], "--long-tokens 0: must be 2"),
    ],
)
def test_what_cannot_be_done(
    arguments: list[str], message: str, tmp_path: Path, jsonl: Path, hf_tokenizer: Path
) -> None:
    words = [
        "--input",
        str(jsonl),
        "--tokenizer",
        str(hf_tokenizer),
        "--output",
        str(tmp_path / "set"),
        "--workers",
        "1",
    ]
    with pytest.raises(UserError, match=message):
        main([*words, *arguments])
    assert not list(tmp_path.glob("*set*"))
