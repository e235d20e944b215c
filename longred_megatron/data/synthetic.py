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
import random
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics

from longred_megatron.errors import UserError
from longred_megatron.evaluation.retrieval_text import WORDS, draw_keys, needle

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
    """Pass keys of `num_keys` words, each stated `num_sayings` times at random places in the filler."""
    sayings = [needle(word, value) for word, value in draw_keys(num_keys, rng)] * num_sayings
    rng.shuffle(sayings)
    before: dict[int, list[str]] = {}
    for saying in sayings:
        before.setdefault(rng.randint(0, len(filler)), []).append(saying)
    return "".join("".join(before.get(place, [])) + line for place, line in enumerate([*filler, ""]))


def _repeats(num_texts: int, max_words: int, rng: random.Random) -> Iterator[str]:
    """Lines of 3 to max_words words, mostly short, said until there are about 2 max_words words."""
    for _ in range(num_texts):
        num_words = int(math.exp(rng.uniform(math.log(3), math.log(max_words + 1))))
        yield repeat_text(num_words, min(max(2 * max_words // num_words, 2), 12), rng)


def _bare_keys(num_texts: int, rng: random.Random) -> Iterator[str]:
    for _ in range(num_texts):
        yield key_text([], rng.randint(1, 6), rng.randint(2, 5), rng)


def _numbers(num_texts: int, rng: random.Random) -> Iterator[str]:
    """Bare keys whose values are numbers of five digits: copying several tokens in a row."""
    for _ in range(num_texts):
        words = rng.sample(WORDS, rng.randint(1, 3))
        sayings = [needle(word, f"{rng.randrange(10**5):05}") for word in words] * rng.randint(3, 6)
        rng.shuffle(sayings)
        yield "".join(sayings)


def _keys(num_texts: int, num_characters: Sequence[int], max_keys: int, rng: random.Random) -> Iterator[str]:
    """Keys between library lines, as many characters of them as one of `num_characters`."""
    texts = training_texts()
    fillers = [stretches(texts, length, rng) for length in num_characters]
    for _ in range(num_texts):
        yield key_text(next(rng.choice(fillers)), rng.randint(1, max_keys), rng.randint(2, 4), rng)


def _many_keys(num_texts: int, num_characters: Sequence[int], max_keys: int, rng: random.Random) -> Iterator[str]:
    """Up to max_keys keys, each stated twice, so that each has one lookup, over any distance of the text."""
    texts = training_texts()
    fillers = [stretches(texts, length, rng) for length in num_characters]
    for _ in range(num_texts):
        filler = next(rng.choice(fillers)) if fillers else []
        yield key_text(filler, rng.randint(max_keys // 2, max_keys), 2, rng)


def _plain(num_texts: int, num_characters: int, rng: random.Random) -> Iterator[str]:
    source = stretches(training_texts(), num_characters, rng)
    for _ in range(num_texts):
        yield "".join(next(source))


# The tokenizer of tests/assets/tiny_base has 2.6 characters a token here, and each of WORDS is one token.
SETS: Mapping[str, Callable[[float, random.Random], Iterable[str]]] = {
    # The tiny base model: windows of 128, then 512 tokens.
    "repeats": lambda share, rng: _repeats(round(16_000 * share), 40, rng),
    "numbers": lambda share, rng: _numbers(round(12_000 * share), rng),
    "keys": lambda share, rng: _bare_keys(round(24_000 * share), rng),
    "keys_128": lambda share, rng: _keys(round(20_000 * share), (60, 120, 180, 240), 4, rng),
    "repeats_512": lambda share, rng: _repeats(round(6_000 * share), 200, rng),
    "keys_512": lambda share, rng: _keys(round(8_000 * share), (300, 600, 900, 1200), 8, rng),
    "many_keys_512": lambda share, rng: _many_keys(round(8_000 * share), (200, 500, 800, 1100), 14, rng),
    "bare_keys_512": lambda share, rng: _many_keys(round(6_000 * share), (), 27, rng),
    "text": lambda share, rng: training_texts(),
    # Its window extended from 512 to 2048 tokens.
    "long": lambda share, rng: [text for text in training_texts() if len(text) > 6000],
    "long_keys": lambda share, rng: _keys(round(300 * share), (4500,), 12, rng),
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
    problems += [f"{path} is there already: choose another folder" for path in paths.values() if path.exists()]
    if share <= 0:
        problems.append(f"share is {share}: it must be above 0")
    if problems:
        raise UserError(*problems)
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for name, path in paths.items():
        texts = list(SETS[name](share, random.Random(f"{seed}/{name}")))
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        written[path] = len(texts)
    return written
