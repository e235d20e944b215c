"""Small real training texts with known answers, from nothing but the Python at hand, for demo and tests.

Three kinds of text:

- *code and prose*: the sources of the Python standard library and the help topics of `pydoc`;
- *repeats*: lines of random words, each said several times, from which a small model learns to copy;
- *keys*: the sentences of `evaluation.retrieval_text`, each said more than once, alone or between lines of
  the library. Every later saying can only be predicted by finding an earlier one, so one text holds many
  retrieval exercises over many distances.

Everything depends on nothing but the generator passed in and the Python version.
"""

import json
import math
import os
import random
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import cycle, islice, repeat
from pathlib import Path
from pydoc_data.topics import topics

from longred_megatron.errors import UserError
from longred_megatron.evaluation.retrieval_text import WORDS, draw_keys, needle
from longred_megatron.files import try_output, write_text

MOST_KEYS = 32  # of one text
MOST_SHARE = 100  # 40 GB of texts
NEEDLE_TOKENS = 9  # of a needle, newline included, by the tokenizer of tests/assets/tiny_base

# Never trained on: perplexity is measured here, and retrieval between these lines.
HELD_OUT_MODULES = (
    "argparse.py",
    "bisect.py",
    "cmd.py",
    "csv.py",
    "email/message.py",
    "fractions.py",
    "gzip.py",
    "http/client.py",
    "json/decoder.py",
    "json/encoder.py",
    "mailbox.py",
    "queue.py",
    "sched.py",
    "shelve.py",
    "statistics.py",
    "tarfile.py",
    "textwrap.py",
    "timeit.py",
)
# Tests repeat themselves, and the code pages under encodings are tables of characters.
_SKIPPED_FOLDERS = frozenset({"site-packages", "test", "tests", "idle_test", "encodings", "ensurepip"})


def library_modules() -> dict[str, str]:
    """Sources of the standard library: path below its folder -> text, in the order of the paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        # The help topics are a module too; `training_texts` adds them as the prose they are.
        if _SKIPPED_FOLDERS.isdisjoint(relative.parts) and relative.as_posix() != "pydoc_data/topics.py":
            modules[relative.as_posix()] = path.read_text(encoding="utf-8")
    return modules


def training_texts() -> list[str]:
    """Every module that is not held out, then the pages of `help()`."""
    modules = [text for name, text in library_modules().items() if name not in HELD_OUT_MODULES]
    return modules + [page for _, page in sorted(topics.items())]


def held_out_texts() -> list[str]:
    """The modules of `HELD_OUT_MODULES`."""
    modules = library_modules()
    return [modules[name] for name in HELD_OUT_MODULES]


def stretches(texts: Sequence[str], num_characters: int, rng: random.Random) -> Iterator[list[str]]:
    """Endless runs of consecutive whole lines of `texts`, each of `num_characters` or little more in all.

    A text is drawn in proportion to the number of lines at which a run can begin, and that line evenly.

    Raises:
        ValueError: no text is long enough.
    """
    pool = []
    for text in texts:
        lines = text.splitlines(keepends=True)
        num_starts, behind = len(lines), 0
        while num_starts and behind < num_characters:
            num_starts -= 1
            behind += len(lines[num_starts])
        if behind >= num_characters:
            pool.append((lines, num_starts + 1))
    if not pool:
        raise ValueError(f"no text has {num_characters} characters")
    weights = [num_starts for _, num_starts in pool]
    while True:
        [(lines, num_starts)] = rng.choices(pool, weights)
        first = last = rng.randrange(num_starts)
        length = 0
        while length < num_characters:
            length += len(lines[last])
            last += 1
        yield lines[first:last]


def repeat_text(num_words: int, num_sayings: int, rng: random.Random) -> str:
    """One line of `num_words` random words, said `num_sayings` times."""
    line = " ".join(rng.choices(WORDS, k=num_words))
    return f" {line}\n" * num_sayings


def key_text(filler: Sequence[str], num_keys: int, num_sayings: int, rng: random.Random) -> str:
    """Pass keys of `num_keys` words, stated `num_sayings` times in all, evenly, at random places in the filler."""
    needles = [needle(word, value) for word, value in draw_keys(num_keys, rng)]
    sayings = list(islice(cycle(needles), num_sayings))
    rng.shuffle(sayings)
    before: dict[int, list[str]] = {}
    for saying in sayings:
        before.setdefault(rng.randint(0, len(filler)), []).append(saying)
    return "".join("".join(before.get(place, [])) + line for place, line in enumerate([*filler, ""]))


def _repeats(num_texts: int, num_tokens: int, draw_num_words: Callable[[], int], rng: random.Random) -> Iterator[str]:
    """Lines of random words, said until there are num_tokens tokens or more."""
    for _ in range(num_texts):
        num_words = draw_num_words()
        yield repeat_text(num_words, num_tokens // (num_words + 1) + 1, rng)


def _keys(num_texts: int, num_tokens: int, fewest_sayings: int, rng: random.Random) -> Iterator[str]:
    """Keys between library lines, from `fewest_sayings` to nothing but sayings, mostly few keys.

    Nearly all texts have num_tokens tokens or more, since few lines have more than 3.2 characters a token.
    """
    texts, most_sayings = training_texts(), num_tokens // NEEDLE_TOKENS + 1
    doubled = (fewest_sayings << i for i in range(most_sayings.bit_length()))
    kinds: list[tuple[int, Iterator[list[str]]]] = [
        (num_sayings, stretches(texts, round(3.2 * (num_tokens - NEEDLE_TOKENS * num_sayings)), rng))
        for num_sayings in doubled
        if num_sayings < most_sayings
    ]
    kinds.append((most_sayings, repeat([])))
    for _ in range(num_texts):
        num_sayings, filler = rng.choice(kinds)
        num_keys = _mostly_small(1, min(num_sayings // 2, MOST_KEYS), rng)
        yield key_text(next(filler), num_keys, num_sayings, rng)


def _mostly_small(smallest: int, largest: int, rng: random.Random) -> int:
    """A whole number whose logarithm is spread evenly."""
    return min(int(math.exp(rng.uniform(math.log(smallest), math.log(largest + 1)))), largest)


def _plain(num_texts: int, num_characters: int, rng: random.Random) -> Iterator[str]:
    source = stretches(training_texts(), num_characters, rng)
    for _ in range(num_texts):
        yield "".join(next(source))


# The tokenizer of tests/assets/tiny_base has 2.6 characters a token here, and each of WORDS is one token.
SETS: Mapping[str, Callable[[float, random.Random], Iterable[str]]] = {
    # The tiny base model, in windows of 128, then 512 tokens: see tools/make_tiny_base.py.
    "repeats_128": lambda share, rng: _repeats(round(30_000 * share), 128, lambda: _mostly_small(3, 60, rng), rng),
    "short_repeats_128": lambda share, rng: _repeats(
        round(20_000 * share), 128, lambda: _mostly_small(3, 20, rng), rng
    ),
    "long_repeats_128": lambda share, rng: _repeats(round(20_000 * share), 128, lambda: rng.randint(3, 62), rng),
    "bare_keys_128": lambda share, rng: _keys(round(40_000 * share), 128, 15, rng),
    "keys_128": lambda share, rng: _keys(round(40_000 * share), 128, 2, rng),
    "keys_512": lambda share, rng: _keys(round(20_000 * share), 512, 2, rng),
    "repeats_512": lambda share, rng: _repeats(round(4_000 * share), 512, lambda: rng.randint(3, 250), rng),
    "text": lambda share, rng: training_texts(),
    # Its window extended from 512 to 2048 tokens.
    "long": lambda share, rng: [text for text in training_texts() if len(text) > 6000],
    "long_keys": lambda share, rng: _keys(round(600 * share), 2048, 4, rng),
    "window": lambda share, rng: _plain(round(1_000 * share), 1500, rng),
    "short": lambda share, rng: _plain(round(2_000 * share), 700, rng),
    # Never trained on.
    "held_out_short": lambda share, rng: [text for text in held_out_texts() if len(text) <= 20_000],
    "held_out_long": lambda share, rng: [text for text in held_out_texts() if len(text) > 20_000],
}


def write_sets(folder: Path, names: Iterable[str], seed: int, share: float = 1.0) -> dict[Path, int]:
    """Writes FOLDER/NAME.jsonl, one {"text": ...} a line, for each of `names`.

    Each set has a generator of its own, so its texts do not depend on which others are written. `share`
    multiplies the number of texts of the drawn sets; the sets of whole modules are always whole.

    Returns:
        path -> number of texts.

    Raises:
        UserError: an unknown set, a share that is not positive, or a file that is there already.
    """
    paths = {name: folder / f"{name}.jsonl" for name in names}
    known = ", ".join(SETS)
    problems = [f"set {name!r} is unknown: choose from {known}" for name in paths if name not in SETS]
    problems += [f"{path} is there already: choose another folder" for path in paths.values() if os.path.lexists(path)]
    if not 0 < share <= MOST_SHARE:
        problems.append(f"share is {share}: it must be above 0 and at most {MOST_SHARE:,}")
    if problems:
        raise UserError(*problems)
    for path in paths.values():
        try_output(path, "--output")
    written = {}
    for name, path in paths.items():
        texts = list(SETS[name](share, random.Random(f"{seed}/{name}")))
        write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))
        written[path] = len(texts)
    return written
