"""Texts of every kind of damage, and damaged sets: what is not used is said, and most of it unusable is an error."""

import gzip
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.hostile import bench
from tests.hostile.case import EVALUATE, PREPARE, TRAIN, Case, Prepare, damaged, editing, in_turn, truncated, writing
from tests.hostile.old_results import remove

LINE = json.dumps({"text": "some words and a few more of them"}) + "\n"
ON_SET = in_turn(bench.edit_recipe(data={"texts": {"set": 1.0}}))
BINARY = bytes(range(256)) * 40


def cases() -> Iterator[Case]:
    yield from lines()
    yield from files()
    yield from parquet()
    yield from sets()
    yield from questions()


def of_input(name: str, content: str | bytes, file: str, code: int | tuple[int, ...], *says: str) -> Iterator[Case]:
    """One file as input of prepare_data and as text of evaluate."""
    for command, words in (("prepare_data", (*PREPARE, file)), ("evaluate", (*EVALUATE, "model", "--text", file))):
        # A few words are not enough to evaluate on.
        codes = (0, 2) if command == "evaluate" and code != 2 else code
        needed = says if command == "prepare_data" or code == 2 else ()
        yield Case(f"{command}: {name}", words, writing(file, content), codes, needed)


def questions() -> Iterator[Case]:
    """Damaged files of questions, and tasks and benchmarks that there are not."""
    good = json.dumps({"question": "who?", "answers": ["me"], "context": "me and you"}) + "\n"
    damages: dict[str, str | bytes] = {
        "nothing": "",
        "one question": good,
        "no answers": '{"question": "who?", "answers": [], "context": "me"}\n',
        "answers of text": '{"question": "who?", "answers": "me", "context": "me"}\n',
        "no documents": '{"question": "who?", "answers": ["me"]}\n',
        "a list": "[]\n",
        "no JSON": good + '{"question": "wh\n',
        "nested": "[" * 100_000 + "\n",
        "a number of 10,000 digits": '{"question": 1' + "0" * 10_000 + "}\n",
        "invalid UTF-8": b'{"question": "\xff\xfe"}\n',
        "half a surrogate pair": good * 2 + good.replace("who?", "\\ud800"),
    }
    ask = (*EVALUATE, "model", "--tasks", "qa_1", "--questions", "q.jsonl")
    for name, content in damages.items():
        yield Case(f"questions: {name}", ask, writing("q.jsonl", content), 2, (r"--questions q\.jsonl",))
    yield Case("questions: no such file", ask, says=(r"--questions q\.jsonl",))
    yield Case("questions: a folder", (*ask[:-1], "corpus"), says=("--questions corpus",))
    yield Case("questions: none given", (*EVALUATE, "model", "--tasks", "qa_2"), says=("--questions FILE",))
    yield Case("a task that is none", (*EVALUATE, "model", "--tasks", "rulr"), says=("did you mean ruler",))
    benchmarks = (*EVALUATE, "model", "--benchmarks")
    yield Case("a benchmark that is none", (*benchmarks, "mmul"), says=("did you mean mmlu",), seconds=60)
    yield Case(
        "benchmark tasks that are no folder", (*benchmarks, "x", "--benchmark-tasks", "none"), says=("no such folder",)
    )


def lines() -> Iterator[Case]:
    """Damaged lines of a .jsonl file: alone, and as one of a hundred."""
    damages = {
        "null": '{"text": null}\n',
        "a number": '{"text": 5}\n',
        "a list": '{"text": ["a"]}\n',
        "no key": '{"txt": "a"}\n',
        "no object": '"words"\n',
        "no JSON": '{"text": "a\n',
        "half a surrogate pair": '{"text": "\\ud800"}\n',
        "invalid UTF-8": b'{"text": "\xff\xfe"}\n',
        "a NUL": '{"text": "a\0b"}\n',
        "nested": "[" * 100_000 + "\n",
        "a number of 10,000 digits": '{"text": "a", "n": 1' + "0" * 10_000 + "}\n",
        "NaN": "NaN\n",
    }
    for name, line in damages.items():
        content = line.encode() if isinstance(line, str) else line
        if name != "a number of 10,000 digits":
            yield from of_input(f"a line of {name}, alone", content, "x.jsonl", 2, r"x\.jsonl")
        mixed = LINE.encode() * 60 + content + LINE.encode() * 39
        # Counted and said, or an error that names the line.
        yield from of_input(f"one line of {name} in 100", mixed, "x.jsonl", (0, 2), r"x\.jsonl|line|61|skipped|1 ")
        most = LINE.encode() * 10 + content * 90
        if len(content) < 1000:
            yield from of_input(f"90 lines of {name} in 100", most, "x.jsonl", 2, r"x\.jsonl")
    yield from of_input("a BOM", b"\xef\xbb\xbf" + LINE.encode() * 50, "x.jsonl", (0, 2))
    yield from of_input("UTF-16", (LINE * 50).encode("utf-16"), "x.jsonl", 2, r"x\.jsonl")
    yield from of_input("an empty .jsonl", b"", "x.jsonl", 2)
    yield from of_input("white space", " \n\t\n", "x.jsonl", 2)
    yield from of_input("carriage returns", (LINE * 50).replace("\n", "\r\n"), "x.jsonl", 0)
    yield from of_input("empty texts", '{"text": ""}\n' * 50, "x.jsonl", (0, 2))


def files() -> Iterator[Case]:
    yield from of_input("a binary file as .txt", BINARY, "x.txt", 2, r"x\.txt", "UTF-8|binary")
    yield from of_input("NULs as .txt", b"\0" * 10_000, "x.txt", 2, r"x\.txt")
    yield from of_input("latin-1 as .txt", "caf\xe9 ".encode("latin-1") * 500, "x.txt", 2, r"x\.txt", "UTF-8")
    yield from of_input("an empty .txt", b"", "x.txt", 2)
    yield from of_input("one long line", "word " * 200_000, "x.txt", 0)
    yield from of_input("gzip", gzip.compress(LINE.encode() * 100), "x.jsonl.gz", 0)
    yield from of_input("truncated gzip", truncated(gzip.compress(os.urandom(5000))), "x.jsonl.gz", 2, r"x\.jsonl\.gz")
    yield from of_input("no gzip", "words", "x.txt.gz", 2, r"x\.txt\.gz")
    yield from of_input("gzip called .jsonl", gzip.compress(LINE.encode() * 100), "x.jsonl", 2, r"x\.jsonl")
    yield from of_input("no zstd", "words", "x.jsonl.zst", 2, r"x\.jsonl\.zst")
    yield from of_input("gzip of a binary file", gzip.compress(BINARY), "x.txt.gz", 2, r"x\.txt\.gz")
    yield from of_input("another suffix", "words", "x.pdf", 2, r"x\.pdf")
    for name, make, says in FOLDERS:
        for command, words in (("prepare_data", (*PREPARE, "corpus")), ("evaluate", (*EVALUATE, "model"))):
            locked = name.startswith("an unreadable")
            yield Case(
                f"{command}: {name} among the texts", words, make, code=(0, 2), says=(says,), unprivileged=locked
            )
    only = in_turn(remove("corpus/a.txt", "corpus/b.jsonl"))
    yield Case("prepare_data: an empty folder", (*PREPARE, "corpus"), only, says=("corpus",))
    yield Case("prepare_data: a file given twice", (*PREPARE, "corpus", "corpus/a.txt"), says=(r"a\.txt",))
    yield Case(
        "prepare_data: a text key that is nowhere", (*PREPARE, "corpus/b.jsonl", "--text-key", "body"), says=("body",)
    )


def unreadable(folder: Path) -> None:
    (folder / "corpus" / "locked").mkdir()
    writing("corpus/locked/a.txt", "words")(folder)
    (folder / "corpus" / "locked").chmod(0)


FOLDERS: list[tuple[str, Prepare, str]] = [
    ("a broken link", lambda f: (f / "corpus" / "gone.txt").symlink_to("nowhere.txt"), r"gone\.txt|broken|link"),
    ("a link to itself", lambda f: (f / "corpus" / "me.txt").symlink_to("me.txt"), r"me\.txt|broken|link"),
    ("a link to the folder above", lambda f: (f / "corpus" / "up").symlink_to(".."), ""),
    ("a FIFO", lambda f: os.mkfifo(f / "corpus" / "pipe.txt"), r"pipe\.txt|not a file|skipped"),
    ("an unreadable folder", unreadable, "locked"),
    (
        "an unreadable file",
        in_turn(writing("corpus/c.txt", "words"), lambda f: (f / "corpus" / "c.txt").chmod(0)),
        r"c\.txt",
    ),
    ("a .gz file", writing("corpus/c.txt.gz", gzip.compress(b"words " * 100)), ""),
    ("a .gz file that is none", writing("corpus/c.txt.gz", "words"), r"c\.txt\.gz"),
    ("a binary .txt", writing("corpus/c.txt", BINARY), r"c\.txt"),
    ("a file of another kind", writing("corpus/c.pdf", BINARY), r"c\.pdf|other|suffix|skipped|1 file"),
    ("a folder called x.txt", lambda f: (f / "corpus" / "x.txt").mkdir(), ""),
    (
        "a name that is no UTF-8",
        lambda f: (Path(os.fsdecode(os.fsencode(f) + b"/corpus/\xff.txt"))).write_text("words "),
        "",
    ),
    ("a name with a line break", writing("corpus/a\nb.txt", "words"), ""),
]


def parquet() -> Iterator[Case]:
    def table(values: list, column: str = "text", change: Callable[[bytes], bytes] = bytes) -> Prepare:
        def prepare(folder: Path) -> None:
            import pyarrow
            from pyarrow import parquet

            parquet.write_table(pyarrow.table({column: values}), folder / "x.parquet")
            editing("x.parquet", change)(folder)

        return prepare

    texts = ["some words " * 50] * 30
    for name, prepare, code, says in [
        ("parquet of null", table([None] * 30), 2, "x.parquet"),
        ("parquet with one null", table([*texts, None]), (0, 2), r"x\.parquet|row|1 "),
        ("parquet of numbers", table([1, 2]), 2, "x.parquet"),
        ("parquet of lists", table([["a"]]), 2, "x.parquet"),
        ("parquet of bytes", table([b"\xff\xfe"]), 2, "x.parquet"),
        ("parquet without the column", table(texts, "body"), 2, "body"),
        ("parquet without rows", table([]), 2, ""),
        ("truncated parquet", table(texts, change=truncated), 2, "x.parquet"),
        (
            "parquet with another byte",
            table([os.urandom(50).hex() for _ in range(100)], change=lambda c: c[:200] + b"\xff" * 50 + c[250:]),
            (0, 2),
            "",
        ),
    ]:
        yield Case(f"prepare_data: {name}", (*PREPARE, "x.parquet"), prepare, code, (says,))
        if code == 2:
            yield Case(f"evaluate: {name}", (*EVALUATE, "model", "--text", "x.parquet"), prepare, code, (says,))
    yield from of_input("no parquet", "words", "x.parquet", 2, r"x\.parquet")


def sets() -> Iterator[Case]:
    """Damaged sets of prepare_data, which a recipe names."""
    for suffix in (".idx", ".bin", ".json"):
        for name, prepare in damaged(f"set{suffix}"):
            harmless = (suffix, name) == (".json", "flipped")  # a digit of a count that nobody needs
            yield Case(
                f"train: set{suffix} {name}",
                TRAIN,
                in_turn(ON_SET, prepare),
                (0, 2) if harmless else 2,
                () if harmless else ("set",),
            )
    yield Case("train: set.idx is gone", TRAIN, in_turn(ON_SET, remove("set.idx")), says=("set",))
    yield Case("train: set.bin is gone", TRAIN, in_turn(ON_SET, remove("set.bin")), says=("set",))
    yield Case("train: set.json is gone", TRAIN, in_turn(ON_SET, remove("set.json")), code=(0, 2))
    # 9 bytes of magic, version <Q, dtype <B, sequences <Q, documents <Q, then lengths <i4, pointers <i8, indices <i8.
    header = {
        "another magic": (0, b"MMIDIDXX"),
        "version 2": (9, struct.pack("<Q", 2)),
        "version 2^63": (9, struct.pack("<Q", 2**63)),
        "dtype 0": (17, b"\0"),
        "dtype 99": (17, b"\x63"),
        "another dtype": (17, b"\x04"),
        "no sequences": (18, struct.pack("<Q", 0)),
        "2^60 sequences": (18, struct.pack("<Q", 2**60)),
        "7 sequences": (18, struct.pack("<Q", 7)),
        "no documents": (26, struct.pack("<Q", 0)),
        "2^60 documents": (26, struct.pack("<Q", 2**60)),
        "a length of 0": (34, struct.pack("<i", 0)),
        "a negative length": (34, struct.pack("<i", -5)),
        "a length above the file": (34, struct.pack("<i", 2**31 - 1)),
        "a length one too long": (34, None),
        "a negative pointer": (34 + 32, struct.pack("<q", -8)),
        "a pointer past the end": (34 + 32, struct.pack("<q", 2**40)),
        "an odd pointer": (34 + 32, struct.pack("<q", 1)),
        "a document index past the end": (34 + 32 + 64 + 8, struct.pack("<q", 10**6)),
    }
    for name, (at, value) in header.items():
        yield Case(f"train: set.idx has {name}", TRAIN, in_turn(ON_SET, patching("set.idx", at, value)), says=("set",))
    tokens = {"a token above the vocabulary": (0, b"\xff\xff"), "another token": (100, struct.pack("<H", 77))}
    for name, (at, value) in tokens.items():
        yield Case(f"train: set.bin has {name}", TRAIN, in_turn(ON_SET, patching("set.bin", at, value)), says=("set",))
    for key, values in {
        "vocab_size": (0, -1, "258", None, 10**30, 5000),
        "tokenizer_sha256": (5, {}, {"tokenizer.json": 5}),
        "dtype": ("int4", 5),
        "tokens": (1, "x"),
        "documents_kept": (1,),
    }.items():
        for value in values:
            change = bench.edit_json("set.json", lambda v, key=key, value=value: v | {key: value})
            wrong = key == "vocab_size"
            yield Case(
                f"train: set.json {key} {value!r}",
                TRAIN,
                in_turn(ON_SET, change),
                2 if wrong else (0, 2),
                ("set",) if wrong else (),
            )


def patching(path: str, at: int, value: bytes | None) -> Prepare:
    def change(content: bytes) -> bytes:
        new = value or struct.pack("<i", struct.unpack_from("<i", content, at)[0] + 1)
        return content[:at] + new + content[at + len(new) :]

    return editing(path, change)
