"""Evaluates several models side by side: perplexity, retrieval, similarity; a table, a JSON file, a page."""

import dataclasses
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import realpath
from pathlib import Path

import torch
import transformers

import longred_megatron
from longred_megatron.errors import UserError
from longred_megatron.evaluation import page, report
from longred_megatron.evaluation.haystacks import Haystacks, read_haystacks
from longred_megatron.evaluation.models import (
    CausalModel,
    ModelFacts,
    load_model,
    read_facts,
    resolve_device,
    resolve_dtype,
)
from longred_megatron.evaluation.perplexity import loss_by_position
from longred_megatron.evaluation.report import ModelReport, Report
from longred_megatron.evaluation.settings import Settings
from longred_megatron.evaluation.similarity import hidden_state_similarity, why_not_comparable
from longred_megatron.evaluation.tasks import chosen_tasks, make_prompts
from longred_megatron.evaluation.tasks.base import Prompt, Task
from longred_megatron.evaluation.tasks.grid import Grid
from longred_megatron.evaluation.tasks.results import measure_task
from longred_megatron.evaluation.texts import (
    TextEncoder,
    TextSource,
    Windows,
    cut_windows,
    load_encoder,
    text_source,
)
from longred_megatron.files import write_text

# Enough to fill a GPU; on a CPU, few enough for activations to stay in its caches (a fifth faster than 8192).
TOKENS_PER_BATCH = {"cuda": 16384, "cpu": 2048}
# Each costs a forward pass of two models, and a mean over 16 windows of tokens is steady.
SIMILARITY_WINDOWS = 16


@dataclass(frozen=True)
class Corpus:
    """The same texts for every model with one tokenizer. prompts: by task, with its number of keys."""

    short: Windows
    long: Windows
    prompts: dict[Task, list[Prompt]]
    notes: tuple[str, ...]


def evaluate(
    models: Sequence[Path],
    output: Path,
    *,
    settings: Settings | None = None,
    reference: Path | None = None,
    names: Sequence[str] = (),
    command: str | None = None,
    show: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Measures Hugging Face folders and writes `output`/results.json and `output`/report.html.

    reference: the model the others started from, default the first of `models`; one that is not among them is measured
    first. names: one for each of `models`, default the shortest ends of their paths that differ. command: shown at the
    end of the page. show: gets the report before it is written, which a full disk may prevent. Raises `UserError` for
    missing folders, texts too short, settings out of range, or an `output` that cannot be written or holds other
    files: before any weight is loaded.
    """
    started = time.perf_counter()
    settings = settings or Settings()
    facts, all_names = _facts_and_names([Path(model) for model in models], reference, names, settings)
    reference_index = 0 if reference is None else [realpath(fact.path) for fact in facts].index(realpath(reference))
    report.check_output(output)
    original, extended = _windows(facts, facts[reference_index], settings)
    device = resolve_device(settings.device)
    tokens_per_batch = settings.tokens_per_batch or TOKENS_PER_BATCH[device.type]
    dtype = resolve_dtype(settings.dtype, device)
    short_source, long_source = _sources(settings)
    tasks, tasks_left_out = chosen_tasks(settings.tasks, settings.options())
    grid = settings.grid(original, extended)
    encoders = [load_encoder(fact.path) for fact in facts]
    corpora = {
        key: build_corpus(encoder, short_source, long_source, original, extended, tasks, grid, settings)
        for key, encoder in {encoder.fingerprint: encoder for encoder in encoders}.items()
    }
    shared_tasks = [task for task in tasks if all(task in corpus.prompts for corpus in corpora.values())]
    base = load_model(facts[reference_index], all_names[reference_index], encoders[reference_index], device, dtype)
    results = []
    for index, (fact, name, encoder) in enumerate(zip(facts, all_names, encoders, strict=True)):
        model = base if index == reference_index else load_model(fact, name, encoder, device, dtype)
        results.append(measure_model(model, base, corpora[encoder.fingerprint], shared_tasks, tokens_per_batch))
        del model  # so that no more than the reference and one other are in memory
    notes = [f"short texts: {short_source.description}", f"long texts: {long_source.description}", *tasks_left_out]
    if len(corpora) > 1:
        notes.append("the tokenizers differ: losses are per token, so their perplexities cannot be compared")
    of_run = {"tokens_per_batch": tokens_per_batch, "device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    finished = Report(
        tuple(results),
        original,
        extended,
        settings=_plain(settings) | {"lengths": list(grid.lengths)} | of_run,
        versions=_versions(device),
        notes=tuple(notes),
        command=command,
        seconds=time.perf_counter() - started,
    )
    show(finished)
    write_text(output / report.PAGE, page.render(finished))
    write_text(output / report.RESULTS, finished.to_json())
    return finished


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
    for kind, windows in (("short", short), ("long", long)):
        if windows.num_joined:
            notes.append(f"{kind} texts: {windows.num_joined} of {len(windows.tokens)} windows join several documents")
    return Corpus(short, long, prompts, tuple(notes))


def _left_out(prompts: Mapping[Task, Sequence[Prompt]], grid: Grid) -> Iterator[str]:
    for task, of_task in prompts.items():
        if left_out := sorted(set(grid.lengths) - {prompt.length for prompt in of_task}):
            yield f"{task.name}: left out at {_list(left_out)} tokens, no room for {task.room_needed()}"


def _shared_filler(haystacks: Haystacks, grid: Grid) -> Iterator[str]:
    needed = grid.num_prompts_per_length
    shared = {length: number for length in grid.lengths if (number := haystacks.num_distinct(length)) < needed}
    if shared:
        held = ", ".join(f"{number:,} of {length:,} tokens" for length, number in shared.items())
        yield f"prompts share filler: {needed:,} of a length, and the texts' stretches that do not overlap are {held}"


def measure_model(
    model: CausalModel, reference: CausalModel, corpus: Corpus, tasks: Sequence[Task], tokens_per_batch: int
) -> ModelReport:
    """All measurements of one model; `reference` may be the model itself, which then has no similarity. tasks: those
    of `corpus` to measure, the same for every model."""
    notes = list(corpus.notes)
    similarity = None
    if model is not reference:
        reason = why_not_comparable(model, reference)
        if reason is None:
            similarity = hidden_state_similarity(
                model, reference, corpus.short.tokens[:SIMILARITY_WINDOWS], tokens_per_batch
            )
        else:
            notes.append(reason)
    return ModelReport(
        name=model.name,
        path=str(model.facts.path),
        family=model.facts.family,
        is_reference=model is reference,
        max_position_embeddings=model.facts.max_position_embeddings,
        rope=model.facts.rope,
        num_parameters=model.num_parameters,
        short=loss_by_position(model, corpus.short, tokens_per_batch, "short texts"),
        long=loss_by_position(model, corpus.long, tokens_per_batch, "long texts"),
        retrieval=tuple(measure_task(model, task, corpus.prompts[task], tokens_per_batch) for task in tasks),
        similarity=similarity,
        notes=tuple(notes),
    )


def _facts_and_names(
    models: list[Path], reference: Path | None, names: Sequence[str], settings: Settings
) -> tuple[list[ModelFacts], list[str]]:
    """Checks everything the user typed about the models, all problems in one error."""
    problems = settings.problems()
    if not models:
        problems.append("--hf: no model given; name at least one Hugging Face folder")
    if names and len(names) != len(models):
        problems.append(f"--name: {len(names)} names for {len(models)} models; give one for each --hf")
    if len(set(names)) != len(names):
        problems.append("--name: a name is given twice; names must differ")
    if len({realpath(model) for model in models}) != len(models):
        problems.append("--hf: a folder is given twice; name each model once")
    extra = [] if reference is None or realpath(reference) in {realpath(model) for model in models} else [reference]
    facts = []
    for path in extra + models:
        try:
            facts.append(read_facts(path))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return facts, [*default_names(extra), *names] if names else default_names(extra + models)


def default_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart: runs/a/hf and runs/b/hf give a/hf and b/hf."""
    parts = [Path(realpath(path)).parts for path in paths]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return []


def _sources(settings: Settings) -> tuple[TextSource, TextSource]:
    """The short and the long texts. Prints what beside them is no text file."""
    short, long = (text_source(paths, settings.text_key) for paths in (settings.short_texts, settings.long_texts))
    for each in dict.fromkeys(short.passed_over + long.passed_over):  # the texts may be the same
        print(f"passed over: {each}", file=sys.stderr)
    return short, long


def _windows(facts: Sequence[ModelFacts], reference: ModelFacts, settings: Settings) -> tuple[int, int]:
    original = settings.original_window or reference.max_position_embeddings
    extended = settings.extended_window or max(original, *(fact.max_position_embeddings for fact in facts))
    problems = []
    if extended < original:
        problems.append(
            f"--window {extended}: is below the original window {original}; raise it or set --original-window"
        )
    longest = max([extended, *settings.lengths])
    # Rotary models compute any position; a table of learned positions ends.
    problems += [
        f"{fact.path}: has no rotary positions and max_position_embeddings {fact.max_position_embeddings}, it cannot "
        f"run at {longest} tokens; set --window and --lengths within it or leave the model out"
        for fact in facts
        if fact.rope is None and longest > fact.max_position_embeddings
    ]
    if problems:
        raise UserError(*problems)
    return original, extended


def _plain(settings: Settings) -> dict[str, object]:
    values = dataclasses.asdict(settings)
    return {key: [str(item) for item in value] if isinstance(value, tuple) else value for key, value in values.items()}


def _versions(device: torch.device) -> dict[str, str]:
    return {
        "longred_megatron": longred_megatron.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
    }


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(f"{number:,}" for number in numbers)
