import json
import random
from pathlib import Path

import pytest

from longred_megatron.errors import UserError
from longred_megatron.evaluation import haystacks as module
from longred_megatron.evaluation.haystacks import Haystacks, read_haystacks
from longred_megatron.evaluation.texts import encoder_of, text_source
from tests.evaluation.conftest import byte_tokenizer

ENCODER = encoder_of(byte_tokenizer())
EOS = 1


def source_of(folder: Path, *texts: str):
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return text_source([file])


def test_documents_in_a_row_as_many_as_are_needed(tmp_path: Path) -> None:
    source = source_of(tmp_path, "abc", "de", "fgh")
    whole = [*ENCODER.encode("abc"), EOS, *ENCODER.encode("de"), EOS, *ENCODER.encode("fgh"), EOS]
    assert list(read_haystacks(source, ENCODER, (5, 10), 100, seed=0).tokens) == whole
    assert list(read_haystacks(source, ENCODER, (1, 2), 3, seed=0).tokens) == whole[:6]


def test_reading_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_TOKENS", 7)
    source = source_of(tmp_path, "abcdefghijklmnopqrstuvwxyz")
    assert len(read_haystacks(source, ENCODER, (4,), 10**6, seed=0).tokens) == 7
    assert len(read_haystacks(source, ENCODER, (12,), 10**6, seed=0).tokens) == 12


@pytest.mark.parametrize("length", [1, 7, 30])
def test_no_two_prompts_share_filler_where_the_texts_suffice(length: int) -> None:
    haystacks = Haystacks(range(1000), ENCODER)
    number = haystacks.num_distinct(length)
    drawn = [haystacks.haystack(i, number, length, random.Random(i)).take(length) for i in range(number)]
    assert len({token for stretch in drawn for token in stretch}) == number * length


def test_haystacks_are_spread_over_all_texts() -> None:
    haystacks = Haystacks(range(10_000), ENCODER)
    starts = [haystacks.haystack(i, 10, 5, random.Random(i)).take(1)[0] for i in range(10)]
    assert [start // 1000 for start in starts] == list(range(10))
    assert len({start % 1000 for start in starts}) > 5


def test_where_they_do_not_suffice_stretches_are_used_evenly() -> None:
    haystacks = Haystacks(range(100), ENCODER)
    starts = [haystacks.haystack(i, 8, 30, random.Random(i)).take(30)[0] for i in range(8)]
    assert haystacks.num_distinct(30) == 3
    assert starts == [0, 30, 60, 0, 30, 60, 0, 30]


def test_as_text_without_tokens_between_documents() -> None:
    tokens = [*ENCODER.encode("one"), EOS, *ENCODER.encode("two"), EOS, EOS, *ENCODER.encode("three")]
    haystack = Haystacks(tokens, ENCODER).haystack(0, 1, len(tokens), random.Random(0))
    assert haystack.text(len(tokens)) == "one\ntwo\nthree"
    with pytest.raises(UserError, match="texts too short: a prompt needs 50 tokens"):
        haystack.text(50)
