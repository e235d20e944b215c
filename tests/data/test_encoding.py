"""Tokenizing processes live no longer than the process that started them."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import repeat
from pathlib import Path

import pytest

from longred_megatron.data import encoding
from longred_megatron.data.documents import Document
from longred_megatron.data.encoding import encoded
from longred_megatron.data.tokenizer import load_tokenizer
from longred_megatron.errors import UserError

# Prints the processes' numbers once they are at work, and goes on without end.
ENDLESS = """
import sys
import threading
from itertools import repeat
from multiprocessing import active_children
from pathlib import Path
from longred_megatron.data import encoding
from longred_megatron.data.documents import Document
from longred_megatron.data.encoding import encoded
from longred_megatron.data.tokenizer import load_tokenizer

if __name__ == "__main__":
    model = Path(sys.argv[1])
    chunks = encoded(repeat(Document("some words of a text " * 200, 1)), load_tokenizer(model), model, workers=2)
    for i, _ in enumerate(chunks):
        if i == 12:
            print(*(child.pid for child in active_children()), flush=True)
"""


def is_there(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_process_is_left(tmp_path, sentencepiece_model, number):
    (tmp_path / "endless.py").write_text(ENDLESS)
    command = [sys.executable, str(tmp_path / "endless.py"), str(sentencepiece_model)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2 and all(map(is_there, workers))
        # Ctrl-C reaches all processes of the terminal, kill -9 the one.
        (os.killpg if number == signal.SIGINT else os.kill)(parent.pid, number)
        until = time.monotonic() + 5
        while time.monotonic() < until and any(map(is_there, [parent.pid, *workers])):
            time.sleep(0.02)
        left = [pid for pid in [parent.pid, *workers] if is_there(pid)]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left
        # One traceback: the parent's own, of this script that does not catch Ctrl-C.
        assert parent.stderr.read().count("Traceback (most") <= 1


@pytest.mark.parametrize("texts", [None, ["some words of a text " * 2000] * 8], ids=["waiting", "answering"])
def test_a_process_ends_in_silence_when_nobody_is_at_the_other_end(sentencepiece_model, texts):
    context = multiprocessing.get_context("spawn")
    own, its = context.Pipe()
    process = context.Process(target=encoding._serve, args=(its, sentencepiece_model, ()))
    process.start()
    its.close()
    if texts is not None:
        own.send(texts)
    own.close()
    process.join(30)
    assert process.exitcode == 0


def test_documents_are_read_as_they_are_needed(monkeypatch, sentencepiece_model):
    monkeypatch.setattr(encoding, "CHUNK_DOCUMENTS", 1)
    read = 0

    def documents():
        nonlocal read
        while read < 30:
            read += 1
            yield Document("some words", 1)

    in_flight = 2 * encoding.CHUNKS_IN_FLIGHT_PER_WORKER
    most = [
        read - taken
        for taken, _ in enumerate(encoded(documents(), load_tokenizer(sentencepiece_model), sentencepiece_model, 2))
    ]
    assert len(most) == 30 and max(most) == in_flight


def test_closing_ends_the_processes_in_the_middle(sentencepiece_model):
    text = Document("some words of a text " * 200, 1)
    chunks = encoded(repeat(text), load_tokenizer(sentencepiece_model), sentencepiece_model, workers=2)
    tokens, num_bytes = next(chunks)
    assert len(tokens) == num_bytes > 1
    start = time.monotonic()
    chunks.close()
    assert time.monotonic() - start < 5


def test_closing_ends_processes_in_the_middle_of_their_results(sentencepiece_model):
    text = Document("some words of a text " * 200, 1)
    for _ in range(6):  # more processes than cores: each time some are about to write
        chunks = encoded(repeat(text), load_tokenizer(sentencepiece_model), sentencepiece_model, workers=10)
        for _ in range(3):
            next(chunks)
        closing = threading.Thread(target=chunks.close, daemon=True)
        closing.start()
        closing.join(30)
        assert not closing.is_alive()


def test_a_mistake_that_a_process_finds_is_one_message(tmp_path, sentencepiece_model):
    tokenizer = load_tokenizer(sentencepiece_model)
    chunks = encoded(repeat(Document("text", 1)), tokenizer, tmp_path / "absent.model", workers=2)
    with pytest.raises(UserError, match=r"absent\.model does not exist"):
        next(chunks)


def test_a_process_that_is_killed_is_one_message(sentencepiece_model):
    text = Document("some words of a text " * 200, 1)
    for number in (1, 10, 10, 10):  # more processes than cores: each time some are about to write
        chunks = encoded(repeat(text), load_tokenizer(sentencepiece_model), sentencepiece_model, workers=10)
        for _ in range(3):
            next(chunks)
        for child in multiprocessing.active_children()[:number]:
            child.kill()
        raised = []

        def go_on(chunks=chunks, raised=raised):
            try:
                list(chunks)
            except UserError as error:
                raised.append(str(error))

        going = threading.Thread(target=go_on, daemon=True)
        going.start()
        going.join(30)
        [message] = raised
        assert "one of 10 tokenizing processes was ended, most likely for want of memory" in message
