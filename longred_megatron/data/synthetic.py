"""Small real training texts with known answers, from nothing but this machine's Python: for the demo, the tests and the tiny base model.

Three kinds of text:

- *prose and code*: the sources of the Python standard library and the help topics of `pydoc`;
- *repeats*: random words, said several times over, from which a small model learns to copy;
- *keys*: standard-library lines with sentences of `evaluation.retrieval_text` between them, each said more than once. Every later saying can only be
  predicted by finding the first one, so one text holds many retrieval exercises, at many distances.

Everything is a pure function of the generator that is passed in and of the Python version.
"""

import random
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics

from longred_megatron.evaluation.retrieval_text import WORDS, draw_value, needle

# Never trained on: what perplexity is measured on.
HELD_OUT_MODULES = (
    "argparse.py", "bisect.py", "cmd.py", "csv.py", "email/message.py", "fractions.py", "gzip.py", "http/client.py", "json/decoder.py",
    "json/encoder.py", "mailbox.py", "queue.py", "sched.py", "shelve.py", "statistics.py", "tarfile.py", "textwrap.py", "timeit.py",
)  # fmt: skip
# Tests repeat themselves, and the code pages under encodings are tables of characters.
_SKIPPED_FOLDERS = frozenset({"site-packages", "test", "tests", "idle_test", "encodings", "__pycache__", "ensurepip", "config"})


def library_modules() -> dict[str, str]:
    """Sources of the standard library: path below its folder -> text, in the order of the paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.isdisjoint(relative.parts) and relative.as_posix() != "pydoc_data/topics.py":
            modules[relative.as_posix()] = path.read_text(encoding="utf-8")
    return modules


def help_topics() -> list[str]:
    """The help pages of `pydoc`, English prose about the language."""
    return [text for _, text in sorted(topics.items())]


def training_modules() -> list[str]:
    return [text for name, text in library_modules().items() if name not in HELD_OUT_MODULES] + help_topics()


def held_out_modules() -> list[str]:
    modules = library_modules()
    return [modules[name] for name in HELD_OUT_MODULES if name in modules]


def windows(texts: Sequence[str], rng: random.Random, num_characters: int) -> Iterator[str]:
    """Endless stretches of whole lines, about `num_characters` long each, from random places of random texts (chosen by length)."""
    pool = [text.splitlines(keepends=True) for text in texts if len(text) >= num_characters]
    sizes = [sum(map(len, lines)) for lines in pool]
    while True:
        lines = rng.choices(pool, sizes)[0]
        first = rng.randrange(len(lines))
        taken, length = [], 0
        for line in lines[first:]:
            taken.append(line)
            length += len(line)
            if length >= num_characters:
                break
        yield "".join(taken)


def repeat_text(rng: random.Random, num_words: int, num_sayings: int) -> str:
    """`num_words` random words, one line, said `num_sayings` times."""
    line = " ".join(rng.choice(WORDS) for _ in range(num_words))
    return f" {line}\n" * num_sayings


def key_text(rng: random.Random, filler: Sequence[str], num_keys: int, num_sayings: int) -> str:
    """`num_keys` pass keys, each stated on `num_sayings` lines of its own, at random places between the lines of `filler`."""
    lines = [needle(word, draw_value(rng)) for word in rng.sample(WORDS, num_keys)] * num_sayings
    rng.shuffle(lines)
    places = sorted(rng.randrange(len(filler) + 1) for _ in lines)
    pieces: list[str] = []
    start = 0
    for place, line in zip(places, lines, strict=True):
        pieces += filler[start:place]
        pieces.append(line)
        start = place
    pieces += filler[start:]
    return "".join(pieces)
