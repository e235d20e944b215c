"""How commands end: every way leaves one message or none, and no traceback."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest


def command(body: str) -> list[str]:
    start = "import sys, time\nfrom pathlib import Path\nfrom longred_megatron.errors import *\ndef main():\n"
    return [sys.executable, "-c", f"{start}{textwrap.indent(body, ' ')}\nrun_cli(main)"]


def ended(body: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(body), capture_output=True, text=True, env=os.environ | changes, timeout=60)


@pytest.mark.parametrize("kind", ["ValueError", "MemoryError", "RecursionError", "BaseException"])
def test_unexpected_is_one_line_and_a_file(kind: str, tmp_path: Path) -> None:
    done = ended(f"report_beside(Path({str(tmp_path)!r}))\nraise {kind}('first\\n\\x1b[2Jsecond')")
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    [file] = tmp_path.iterdir()
    assert f"{kind}: first \\x1b[2Jsecond" in line and str(file) in line
    assert "Traceback" in file.read_text(encoding="utf-8")


def test_unexpected_without_a_folder_goes_to_the_temporary_one(tmp_path: Path) -> None:
    done = ended("report_beside(Path('/nonexistent'))\n1 / 0", TMPDIR=str(tmp_path))
    assert str(next(tmp_path.iterdir())) in done.stderr


def test_a_message_cannot_forge_the_terminal() -> None:
    done = ended("raise UserError('bad\\nerror: all is well\\x1b[1A\\x07\\u202e')")
    assert done.returncode == 2
    assert done.stderr == "error: bad error: all is well\\x1b[1A\\x07\\u202e\n"


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_closed_pipe_ends_quietly(lines: int) -> None:
    process = subprocess.Popen(
        command(f"time.sleep(0.3)\nfor _ in range({lines}): print('line')"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    process.stdout.close()
    process.stdout = None
    assert (process.communicate()[1], process.returncode) == (b"", 141)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cleans_up_and_ends_without_a_word(number: int) -> None:
    body = "try:\n print('ready', flush=True)\n time.sleep(60)\nfinally:\n print('cleaned')"
    process = subprocess.Popen(command(body), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    process.stdout.readline()
    process.send_signal(number)
    out, err = process.communicate(timeout=5)
    assert (out, err, process.returncode) == ("cleaned\n", "", 128 + number)


def test_an_ascii_locale_prints_everything() -> None:
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    done = ended("print('\\xe9')\nraise UserError('\\xfc')", **ascii_locale)
    assert (done.stdout, done.returncode) == ("\\xe9\n", 2)
    assert done.stderr == "error: \\xfc\n"


def test_below_torchrun_the_message_comes_last() -> None:
    """Its page stands for torchrun's: printed by the parent after the rank has ended."""
    rank = command("raise UserError('the mistake')")
    agent = f"import subprocess, sys; subprocess.run({rank!r}); print('a page', file=sys.stderr)"
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", agent],
        capture_output=True,
        text=True,
        env=os.environ | {"TORCHELASTIC_RUN_ID": "x"},
        timeout=60,
    )
    assert done.stderr.splitlines() == ["error: the mistake", "a page", "error: the mistake"]
    assert time.monotonic() - started < 10
