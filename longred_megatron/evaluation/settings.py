"""What an evaluation measures, and what can be wrong with it."""

from dataclasses import dataclass
from pathlib import Path

from longred_megatron.evaluation.retrieval_text import WORDS
from longred_megatron.evaluation.tasks import DEFAULT_TASKS
from longred_megatron.evaluation.tasks.base import Options
from longred_megatron.evaluation.tasks.grid import Grid, doubling_lengths, even_depths

# Far above what anybody measures: a slip of the hand is told before it costs days.
LONGEST_TOKENS, MOST_PROMPTS = 100_000_000, 1_000_000
RANGES = {
    "num_short_windows": (1, 100_000),
    "num_long_windows": (1, 100_000),
    "num_depths": (1, 1_000),
    "num_prompt_sets": (1, 10_000),
    "num_samples": (1, 100_000),
    "num_keys": (2, len(WORDS) // 2),  # a key and its value are different words
    "tokens_per_batch": (1, 2**31),
    "seed": (0, 2**63 - 1),
}


@dataclass(frozen=True)
class Settings:
    """What to measure. Windows and lengths are in tokens; None takes them from the models' configs.

    original_window: default the reference's max_position_embeddings; extended_window: default the largest of
    the models'; lengths: of retrieval prompts, default a quarter of the original window, doubled up to the
    extended one. short_texts, long_texts: files and folders; none: the Python standard library's sources.
    text_key: the text's key in .jsonl lines, and its column in .parquet files. tasks: names in `TASKS` or `GROUPS`;
    of each, num_prompt_sets independent sets with num_samples prompts for every length and depth. questions: a file of
    them, see `read_questions`. chat_template: see `Options`. benchmarks, benchmark_tasks: see `chosen_benchmarks`.
    tokens_per_batch: rows of a window are batched up to this many tokens.
    """

    short_texts: tuple[Path, ...] = ()
    long_texts: tuple[Path, ...] = ()
    text_key: str = "text"
    original_window: int | None = None
    extended_window: int | None = None
    num_short_windows: int = 64
    num_long_windows: int = 16
    lengths: tuple[int, ...] = ()
    tasks: tuple[str, ...] = DEFAULT_TASKS
    num_depths: int = 5
    num_prompt_sets: int = 3
    num_samples: int = 4
    num_keys: int = 4
    questions: Path | None = None
    chat_template: bool = False
    benchmarks: tuple[str, ...] = ()
    benchmark_tasks: Path | None = None
    tokens_per_batch: int | None = None
    seed: int = 2024
    device: str = "auto"
    dtype: str = "auto"

    def grid(self, original_window: int, extended_window: int) -> Grid:
        """The prompts of each task."""
        lengths = self.lengths or doubling_lengths(original_window, extended_window)
        return Grid(lengths, even_depths(self.num_depths), self.num_prompt_sets, self.num_samples, self.seed)

    def options(self) -> Options:
        """What single tasks ask for."""
        return Options(num_keys=self.num_keys, questions=self.questions, chat_template=self.chat_template)

    def problems(self) -> list[str]:
        """One sentence for every setting out of its range."""
        found = [] if self.tasks else ["--tasks: none given; name at least one"]
        found += [
            f"--{key.removeprefix('num_').replace('_', '-')} {value}: must be {least:,} to {most:,}"
            for key, (least, most) in RANGES.items()
            if (value := getattr(self, key)) is not None and not least <= value <= most
        ]
        num_prompts = (
            len(self.lengths or "1") * len(self.tasks) * self.num_depths * self.num_prompt_sets * self.num_samples
        )
        if not found and num_prompts > MOST_PROMPTS:
            found.append(
                f"--tasks, --lengths, --depths, --prompt-sets and --samples make {num_prompts:,} prompts; "
                f"at most {MOST_PROMPTS:,} can be measured: lower one"
            )
        for key, flag in (("original_window", "--original-window"), ("extended_window", "--window")):
            value = getattr(self, key)
            if value is not None and not 2 <= value <= LONGEST_TOKENS:
                found.append(f"{flag} {value}: must be 2 to {LONGEST_TOKENS:,} tokens")
        return found + [
            f"--lengths {length}: must be 1 to {LONGEST_TOKENS:,} tokens"
            for length in self.lengths
            if not 1 <= length <= LONGEST_TOKENS
        ]
