"""Evaluates several models side by side: perplexity, retrieval, similarity; a table, a JSON file, a page."""

import dataclasses
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os.path import realpath
from pathlib import Path

import torch
import transformers

import longred_megatron
from longred_megatron.errors import UserError
from longred_megatron.evaluation import page, report
from longred_megatron.evaluation.benchmarks.harness import chosen_benchmarks
from longred_megatron.evaluation.benchmarks.published import Benchmark
from longred_megatron.evaluation.corpus import Corpus, build_corpus, with_shared_tasks
from longred_megatron.evaluation.measure import Measured, measure_model
from longred_megatron.evaluation.models import (
    ModelFacts,
    resolve_device,
    resolve_dtype,
)
from longred_megatron.evaluation.prompt_file import FLAG, check_prompt_file, write_prompts
from longred_megatron.evaluation.report import ModelReport, Report
from longred_megatron.evaluation.settings import Settings
from longred_megatron.evaluation.subjects import Subject, subjects_of
from longred_megatron.evaluation.tasks import chosen_tasks
from longred_megatron.evaluation.tasks.grid import Grid
from longred_megatron.evaluation.texts import (
    TextSource,
    text_source,
)
from longred_megatron.files import write_text
from longred_megatron.page import PAGE, RESULTS

# Enough to fill a GPU; on a CPU, few enough for activations to stay in its caches (a fifth faster than 8192).
TOKENS_PER_BATCH = {"cuda": 16384, "cpu": 2048}


def evaluate(
    models: Sequence[Path],
    output: Path,
    *,
    settings: Settings | None = None,
    reference: Path | None = None,
    names: Sequence[str] = (),
    runs: Sequence[Path] = (),
    command: str | None = None,
    show: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Measures Hugging Face folders and writes `output`/results.json and `output`/report.html.

    reference: the model the others started from, default the first of `models`; one that is not among them is measured
    first. names: one for each of `models`, default the shortest ends of their paths that differ. runs: run folders,
    of which every checkpoint is one more model. command: shown at the end of the page. show: gets the report before it
    is written, which a full disk may prevent. Raises `UserError` for missing folders, texts too short, settings out of
    range, or an `output` that cannot be written or holds other files: before any weight is loaded.
    """
    started = time.perf_counter()
    settings = settings or Settings()
    report.check_output(output)
    ready = _prepare(models, settings, reference, names, runs)
    results = _measure(ready, settings)
    finished = Report(
        tuple(results),
        ready.original_window,
        ready.extended_window,
        settings=_plain(settings) | ready.derived_settings(),
        versions=_versions(ready.device),
        notes=ready.notes(),
        command=command,
        seconds=time.perf_counter() - started,
    )
    show(finished)
    write_text(output / PAGE, page.render(finished))
    write_text(output / RESULTS, finished.to_json())
    return finished


def write_prompt_file(
    models: Sequence[Path],
    path: Path,
    *,
    settings: Settings | None = None,
    reference: Path | None = None,
    runs: Sequence[Path] = (),
) -> int:
    """Writes the prompts that `evaluate` would ask of the same models, and measures nothing. Returns their number.

    Raises `UserError` as `evaluate`, for a `path` that is there already, and for models of several tokenizers.
    """
    check_prompt_file(path)
    ready = _prepare(models, settings or Settings(), reference, runs=runs)
    if len(ready.corpora) > 1:
        raise UserError(f"{FLAG}: the models' tokenizers differ; write a file for each of them")
    [corpus] = ready.corpora.values()
    for note in (*ready.left_out, *corpus.notes):
        print(f"note: {note}", file=sys.stderr)
    return write_prompts(path, corpus.prompts, ready.subjects[0].encoder)


@dataclass(frozen=True)
class _Ready:
    """Everything that is known before a weight is loaded. reference: its place in `subjects`; corpora: by the
    fingerprint of the tokenizer; left_out: notes on tasks that lack something."""

    subjects: list[Subject]
    reference: int
    original_window: int
    extended_window: int
    grid: Grid
    sources: tuple[TextSource, TextSource]
    left_out: list[str]
    benchmarks: list[Benchmark]
    corpora: dict[str, Corpus]
    device: torch.device
    dtype: torch.dtype
    tokens_per_batch: int

    def derived_settings(self) -> dict[str, object]:
        """What settings left open."""
        derived = {"lengths": list(self.grid.lengths), "tokens_per_batch": self.tokens_per_batch}
        return derived | {"device": str(self.device), "dtype": str(self.dtype).removeprefix("torch.")}

    def notes(self) -> tuple[str, ...]:
        short, long = self.sources
        notes = (f"short texts: {short.description}", f"long texts: {long.description}", *self.left_out)
        if len(self.corpora) == 1:
            return notes
        return (
            *notes,
            "the tokenizers differ: losses are per token, so their perplexities cannot be compared, and no difference "
            "is paired",
        )


def _prepare(
    models: Sequence[Path],
    settings: Settings,
    reference: Path | None,
    names: Sequence[str] = (),
    runs: Sequence[Path] = (),
) -> _Ready:
    problems = settings.problems()
    try:
        subjects = subjects_of([Path(model) for model in models], [Path(run) for run in runs], reference, names)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(*problems)
    places = [realpath(subject.facts.path) for subject in subjects]
    reference_index = 0 if reference is None else places.index(realpath(reference))
    original, extended = _windows([subject.facts for subject in subjects], subjects[reference_index].facts, settings)
    device = resolve_device(settings.device)
    dtype = resolve_dtype(settings.dtype, device)
    sources = _sources(settings)
    benchmarks = chosen_benchmarks(settings.benchmarks, settings.benchmark_tasks)
    tasks, left_out = chosen_tasks(settings.tasks, settings.options())
    grid = settings.grid(original, extended)
    corpora = {
        key: build_corpus(encoder, *sources, original, extended, tasks, grid, settings)
        # Of several models with one tokenizer the first gives the chat template.
        for key, encoder in {subject.encoder.fingerprint: subject.encoder for subject in reversed(subjects)}.items()
    }
    return _Ready(
        subjects, reference_index, original, extended, grid, sources, left_out, benchmarks, with_shared_tasks(corpora),
        device, dtype, settings.tokens_per_batch or TOKENS_PER_BATCH[device.type],
    )  # fmt: skip


def _measure(ready: _Ready, settings: Settings) -> list[ModelReport]:
    """The reports in the order of the models; the reference, which the others are compared with, is measured first."""

    def measured(subject: Subject, base: Measured | None = None) -> Measured:
        model = subject.load(ready.device, ready.dtype)
        corpus = ready.corpora[subject.encoder.fingerprint]
        return measure_model(subject, model, corpus, ready.benchmarks, ready.tokens_per_batch, settings.seed, base)

    reference = ready.subjects[ready.reference]
    base = measured(reference)
    # No more than the reference and one other are in memory.
    return [base.report if subject is reference else measured(subject, base).report for subject in ready.subjects]


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
    """Its fields as JSON has them."""
    values = {
        key: [str(item) for item in value] if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(settings).items()
    }
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


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
