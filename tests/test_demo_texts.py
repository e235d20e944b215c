"""The generator of demo texts: reproducible, its answers known, its held-out modules never trained on."""

import json
import random
import re
from pathlib import Path

import pytest
import sentencepiece

from longred_megatron.errors import UserError
from longred_megatron.evaluation.retrieval_text import WORDS, answer, draw_keys, needle, query
from tools import demo_texts

TOKENIZER = Path(__file__).parent / "assets" / "tiny_base" / "tokenizer.model"
DRAWN = ["repeats_128", "bare_keys_128", "keys_128", "short"]  # one of each kind


def read(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_needle_is_its_query_and_answer() -> None:
    [(word, value)] = draw_keys(1, random.Random(0))
    assert {word, value} <= set(WORDS) and word != value
    assert needle("river", value) == query("river") + answer(value) + ".\n"


def test_words_differ_and_are_one_token_each() -> None:
    assert len(set(WORDS)) == len(WORDS) >= 200
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER))
    assert [word for word in WORDS if len(tokenizer.encode(f" {word}")) != 1] == []


def test_key_text_states_every_key_equally_often_and_keeps_the_filler_in_order() -> None:
    filler = [f"line {number}\n" for number in range(20)]
    lines = demo_texts.key_text(filler, 3, 12, random.Random(1)).splitlines(keepends=True)
    sayings = [line for line in lines if line not in filler]
    assert [line for line in lines if line in filler] == filler
    stated = {re.fullmatch(r"The pass key of (\w+) is (\w+)\.\n", line).groups() for line in sayings}  # type: ignore[union-attr]
    assert len(sayings) == 12 and all(sayings.count(line) == 4 for line in sayings)
    assert len(stated) == len({word for word, _ in stated}) == 3


def test_keys_are_spread_over_every_place() -> None:
    filler = [f"{number}\n" for number in range(4)]
    places = {
        demo_texts.key_text(filler, 1, 1, random.Random(seed)).splitlines().index(line)
        for seed in range(60)
        for line in demo_texts.key_text(filler, 1, 1, random.Random(seed)).splitlines()
        if line.startswith("The pass key")
    }
    assert places == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    "name",
    ["repeats_128", "short_repeats_128", "long_repeats_128", "bare_keys_128", "keys_128", "keys_512", "repeats_512"],
)
def test_texts_named_for_a_number_of_tokens_nearly_all_have_as_many(name: str, tmp_path: Path) -> None:
    num_tokens = int(name.rpartition("_")[2])
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER))
    [path] = demo_texts.write_sets(tmp_path, [name], seed=1, share=0.01)
    lengths = [len(tokenizer.encode(text)) for text in read(path)]
    assert sum(length >= num_tokens for length in lengths) >= 0.95 * len(lengths)


def test_repeat_text_says_one_line_again() -> None:
    lines = demo_texts.repeat_text(7, 3, random.Random(0)).splitlines()
    assert len(lines) == 3 and len(set(lines)) == 1 and len(lines[0].split()) == 7


@pytest.mark.parametrize("num_characters", [1, 10, 25])
def test_stretches_are_whole_consecutive_lines_of_the_length_asked_for(num_characters: int) -> None:
    texts = ["short\n", "".join(f"line {number}\n" for number in range(10, 20)), "no newline at its end" * 2]
    source = demo_texts.stretches(texts, num_characters, random.Random(0))
    for _ in range(50):
        lines = next(source)
        run = "".join(lines)
        assert any(run in text for text in texts)
        assert len(run) - len(lines[-1]) < num_characters <= len(run)


def test_stretches_reach_the_first_and_the_last_line() -> None:
    text = "a\nb\nc\nd\n"
    source = demo_texts.stretches([text], 4, random.Random(0))
    assert {"".join(next(source)) for _ in range(60)} == {"a\nb\n", "b\nc\n", "c\nd\n"}


def test_stretches_need_a_text_that_is_long_enough() -> None:
    with pytest.raises(ValueError, match="no text has 7 characters"):
        next(demo_texts.stretches(["abcdef"], 7, random.Random(0)))


def test_held_out_modules_exist_and_are_not_in_any_training_text() -> None:
    held_out, training = demo_texts.held_out_texts(), demo_texts.training_texts()
    assert len(held_out) == len(demo_texts.HELD_OUT_MODULES)
    assert not set(held_out) & set(training)
    assert sum(map(len, training)) > 5_000_000


def test_the_same_seed_gives_the_same_bytes_whatever_else_is_written(tmp_path: Path) -> None:
    demo_texts.write_sets(tmp_path / "all", DRAWN, seed=3, share=0.005)
    for name in DRAWN:
        demo_texts.write_sets(tmp_path / "alone", [name], seed=3, share=0.005)
        assert (tmp_path / "alone" / f"{name}.jsonl").read_bytes() == (tmp_path / "all" / f"{name}.jsonl").read_bytes()
    demo_texts.write_sets(tmp_path / "other", ["keys_128"], seed=4, share=0.005)
    assert (tmp_path / "other" / "keys_128.jsonl").read_bytes() != (tmp_path / "all" / "keys_128.jsonl").read_bytes()


def test_written_texts_are_counted_and_scaled(tmp_path: Path) -> None:
    written = demo_texts.write_sets(tmp_path, ["short", "held_out_short", "held_out_long"], seed=0, share=0.01)
    assert {path.stem: len(read(path)) for path in written} == {path.stem: count for path, count in written.items()}
    assert written[tmp_path / "short.jsonl"] == 20
    held_out = read(tmp_path / "held_out_short.jsonl") + read(tmp_path / "held_out_long.jsonl")
    assert sorted(held_out) == sorted(demo_texts.held_out_texts())


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "short.jsonl").touch()
    with pytest.raises(UserError) as caught:
        demo_texts.write_sets(tmp_path, ["short", "shrot"], seed=0, share=0)
    assert len(caught.value.problems) == 3 and "shrot" in str(caught.value)
