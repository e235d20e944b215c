"""The command line tools/prepare_data.py."""

import json

import pytest

from longred_megatron.errors import run_cli
from tools.prepare_data import main


def exit_code(*arguments):
    with pytest.raises(SystemExit) as left:
        run_cli(lambda: main([str(argument) for argument in arguments]))
    return left.value.code


@pytest.fixture
def given(jsonl, sentencepiece_model, tmp_path):
    return [
        "--input",
        jsonl,
        "--tokenizer",
        sentencepiece_model,
        "--output",
        tmp_path / "set",
        "--workers",
        1,
    ]


def test_counts_are_printed_and_stored(capsys, tmp_path, given):
    assert exit_code(*given, "--min-tokens", 20) == 0
    shown = capsys.readouterr()
    stored = json.loads((tmp_path / "set.json").read_text())
    assert stored["documents_dropped"] > 0
    assert f"{stored['documents_kept']} documents kept, {stored['documents_dropped']} dropped" in shown.out
    assert f"{tmp_path / 'set'}.bin" in shown.out
    assert "tokenizing" not in shown.err  # no progress bar where nobody looks


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--tokenizer", "/absent"], "tokenizer /absent does not exist"),
        (["--input", "/absent"], "input /absent does not exist"),
        (["--min-tokens", 0], "--min-tokens is 0; give at least 1"),
        (["--workers", 0], "--workers is 0; give at least 1"),
        (
            ["--text-key", "body"],
            "texts.jsonl:1: no key 'body' (its keys: 'text'); name the text's key with --text-key",
        ),
        (["--min-tokens", 10**6], "no document kept"),
        (["--min-tokens", "many"], "invalid int value"),
    ],
)
def test_mistakes_end_with_code_2_and_one_message(capsys, given, tmp_path, extra, message):
    assert exit_code(*given, *extra) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("set*"))


def test_an_existing_set_needs_overwrite(capsys, given):
    assert exit_code(*given) == 0
    assert exit_code(*given) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert exit_code(*given, "--overwrite") == 0
