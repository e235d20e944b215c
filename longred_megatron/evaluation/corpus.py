"""What every model with one tokenizer reads: windows of text, and prompts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from longred_megatron.evaluation.haystacks import Haystacks, read_haystacks
from longred_megatron.evaluation.settings import Settings
from longred_megatron.evaluation.tasks import make_prompts
from longred_megatron.evaluation.tasks.base import Prompt, Task
from longred_megatron.evaluation.tasks.grid import Grid
from longred_megatron.evaluation.texts import MAX_WINDOWS_PER_DOCUMENT, TextEncoder, TextSource, Windows, cut_windows

# With fewer, resampling documents has hardly anything to resample.
FEW_DOCUMENTS = 8


@dataclass(frozen=True)
class Corpus:
    """The same texts for every model with one tokenizer. prompts: by task."""

    short: Windows
    long: Windows
    prompts: dict[Task, list[Prompt]]
    notes: tuple[str, ...]


def build_corpus(
    encoder: TextEncoder,
    short_source: TextSource,
    long_source: TextSource,
    original_window: int,
    extended_window: int,
    tasks: Sequence[Task],
    grid: Grid,
    settings: Settings,
) -> Corpus:
    """Windows and prompts for one tokenizer. Raises `UserError` when the texts are too short."""
    short = cut_windows(short_source, encoder, original_window, settings.num_short_windows, settings.seed)
    long = cut_windows(long_source, encoder, extended_window, settings.num_long_windows, settings.seed)
    haystacks = read_haystacks(long_source, encoder, grid.lengths, grid.num_prompts_per_length, settings.seed)
    prompts, notes = make_prompts(tasks, settings.tasks, encoder, haystacks, grid)
    notes += [*_left_out(prompts, grid), *_shared_filler(haystacks, grid)]
    notes += _window_notes("short", short, settings.num_short_windows)
    notes += _window_notes("long", long, settings.num_long_windows)
    return Corpus(short, long, prompts, tuple(notes))


def with_shared_tasks(corpora: Mapping[str, Corpus]) -> dict[str, Corpus]:
    """The corpora, by tokenizer, with the tasks that all of them have room for."""
    shared = set.intersection(*(set(corpus.prompts) for corpus in corpora.values()))
    return {
        key: replace(corpus, prompts={task: of_task for task, of_task in corpus.prompts.items() if task in shared})
        for key, corpus in corpora.items()
    }


def _window_notes(kind: str, windows: Windows, num_asked: int) -> Iterator[str]:
    number = len(windows.tokens)
    if number < num_asked:
        yield (
            f"{kind} texts: {number} of {num_asked} windows asked for; a document gives at most "
            f"{MAX_WINDOWS_PER_DOCUMENT}, and there are no more"
        )
    if windows.num_joined:
        yield f"{kind} texts: {windows.num_joined} of {number} windows join several documents"
    if windows.num_documents < FEW_DOCUMENTS:
        yield (
            f"{kind} texts: the {number} windows are of fewer than {FEW_DOCUMENTS} documents "
            f"({windows.num_documents}); their intervals are rough"
        )


def _left_out(prompts: Mapping[Task, Sequence[Prompt]], grid: Grid) -> Iterator[str]:
    for task, of_task in prompts.items():
        if left_out := sorted(set(grid.lengths) - {prompt.length for prompt in of_task}):
            yield f"{task.name}: left out at {_list(left_out)} tokens, no room for {task.room_needed()}"


def _shared_filler(haystacks: Haystacks, grid: Grid) -> Iterator[str]:
    needed = grid.num_prompts_per_length
    shared = {length: number for length in grid.lengths if (number := haystacks.num_distinct(length)) < needed}
    if shared:
        held = ", ".join(f"{number:,} of {length:,} tokens" for length, number in shared.items())
        yield (
            f"prompts share filler: there are {needed:,} of a length, and stretches that do not overlap in the "
            f"{len(haystacks.tokens):,} tokens read: {held}"
        )


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(f"{number:,}" for number in numbers)
