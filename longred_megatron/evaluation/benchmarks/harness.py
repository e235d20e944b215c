"""Benchmarks by lm-evaluation-harness. Nothing is downloaded, and no code that a model writes is run unasked."""

import copy
import difflib
import importlib
import importlib.util
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from longred_megatron.errors import UserError
from longred_megatron.evaluation.benchmarks.published import OWN_ABILITY, PUBLISHED, Benchmark
from longred_megatron.evaluation.benchmarks.results import BenchmarkResult
from longred_megatron.evaluation.models import CausalModel

# The switch of the harness and of its metric for running code that a model wrote.
ALLOW_CODE = "HF_ALLOW_CODE_EVAL"
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
_LOADED: dict[str, ModuleType] = {}


def chosen_benchmarks(names: Sequence[str], folder: Path | None) -> list[Benchmark]:
    """The benchmarks named, each once; folder: of the user's own task files (YAML) for the harness.

    Raises `UserError` for names that are none, for data sets that are not on disk, for code that may not be run, and
    when the harness is not installed: before any model is loaded.
    """
    if not names:
        return []
    if importlib.util.find_spec("lm_eval") is None or importlib.util.find_spec("accelerate") is None:
        raise UserError(
            "--benchmarks: needs lm-evaluation-harness; install it with: pip install 'longred-megatron[eval]'"
        )
    problems: list[str] = []
    if folder is not None and not folder.is_dir():
        raise UserError(f"--benchmark-tasks {folder}: no such folder; give one with task files (YAML) of the harness")
    known = PUBLISHED | (_own_benchmarks(folder) if folder else {})
    chosen = []
    for name in dict.fromkeys(names):
        if name in known:
            chosen.append(known[name])
            continue
        nearest = difflib.get_close_matches(name, known, n=3)
        tip = f"did you mean {' or '.join(nearest)}?" if nearest else f"there are {', '.join(known)}"
        problems.append(f"--benchmarks {name}: no such benchmark; {tip}")
    problems += [problem for benchmark in chosen for problem in _problems(benchmark)]
    if problems:
        raise UserError(*problems)
    return chosen


def measure_benchmarks(
    model: CausalModel, benchmarks: Sequence[Benchmark], tokens_per_batch: int
) -> tuple[BenchmarkResult, ...]:
    """Asks every question of `benchmarks`. tokens_per_batch: questions are batched as if each had 512 tokens."""
    if not benchmarks:
        return ()
    tokenizer = copy.deepcopy(model.encoder.tokenizer)  # the harness gives it a padding token
    with _inside_harness():
        from lm_eval.models.huggingface import HFLM

        network: Any = model.network
        harness_model = HFLM(
            pretrained=network, backend="causal", tokenizer=tokenizer, batch_size=max(1, tokens_per_batch // 512)
        )
    progress = tqdm(benchmarks, desc=f"{model.name}: benchmarks", unit="benchmark", disable=None, leave=False)
    return tuple(_measure(harness_model, benchmark) for benchmark in progress)


def _measure(harness_model: Any, benchmark: Benchmark) -> BenchmarkResult:
    with _inside_harness():
        import lm_eval

        found = lm_eval.simple_evaluate(
            model=harness_model,
            tasks=[benchmark.task],
            num_fewshot=benchmark.num_examples,
            task_manager=_task_manager(benchmark.folder),
            bootstrap_iters=0,
            confirm_run_unsafe_code=_code_is_allowed(),
        )
    of_task = found["results"][benchmark.task]
    metric = benchmark.metric or next(key for key in of_task if "," in key)
    name, _, kind = metric.partition(",")
    scores = [
        sample.get(name)
        for task in found["samples"]
        for sample in sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
        if sample["filter"] == kind
    ]
    plain = all(isinstance(score, bool | int | float) for score in scores)
    return BenchmarkResult(
        benchmark=benchmark.name,
        ability=benchmark.ability,
        task=benchmark.task,
        metric=metric,
        num_examples=benchmark.num_examples,
        num_questions=len(scores),
        score=float(of_task[metric]) / benchmark.best,
        scores=tuple(float(score) / benchmark.best for score in scores) if plain else (),
    )


def _problems(benchmark: Benchmark) -> Iterator[str]:
    """Tries to load the data set, and whether code may be run."""
    if benchmark.runs_code and not _code_is_allowed():
        yield (
            f"--benchmarks {benchmark.name}: runs code that the model writes; set {ALLOW_CODE}=1 where that may do no "
            "harm, or leave it out"
        )
        return
    try:
        with _inside_harness():
            _task_manager(benchmark.folder).load([benchmark.task])
    except Exception as error:  # whatever datasets, the harness and the user's file raise
        what = f"its data set {benchmark.dataset} is not on disk" if benchmark.dataset else "cannot be loaded"
        fetch = f"; run it once with a network (lm_eval --tasks {benchmark.task}), with the same HF_HOME"
        yield f"--benchmarks {benchmark.name}: {what} ({error}){fetch if benchmark.dataset else ''}"


def _own_benchmarks(folder: Path) -> dict[str, Benchmark]:
    try:
        with _inside_harness():
            names = _task_manager(str(folder.resolve())).all_tasks
    except Exception as error:  # of damaged files
        raise UserError(f"--benchmark-tasks {folder}: the harness cannot read its task files ({error})") from error
    return {name: Benchmark(name, OWN_ABILITY, name, str(folder.resolve()), None, None) for name in names}


def _task_manager(folder: str) -> Any:
    """For the tasks of one folder: reading the files of all 14,000 takes half a minute. folder: see `Benchmark`."""
    import lm_eval.tasks

    path = Path(lm_eval.tasks.__file__).parent / folder  # an absolute one stays itself
    return lm_eval.tasks.TaskManager(include_path=str(path), include_defaults=False)


def _code_is_allowed() -> bool:
    return os.environ.get(ALLOW_CODE) == "1"


@contextmanager
def _inside_harness() -> Iterator[None]:
    """Around every call of the harness: offline, without progress bars in files, and with its metrics."""
    os.environ |= dict.fromkeys(OFFLINE, "1")
    with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()), _hugging_face_evaluate() as evaluate:
        import datasets
        import huggingface_hub

        # The libraries read the variables when they are imported, which others may have done already.
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True
        evaluate.config.HF_EVALUATE_OFFLINE = True
        yield


@contextmanager
def _hugging_face_evaluate() -> Iterator[Any]:
    """The package `evaluate`, whose metrics the harness uses. For a command of tools/ its evaluate.py comes first."""
    own = sys.modules.pop("evaluate", None)
    paths = sys.path[:]
    sys.path[:] = [path for path in paths if not Path(path, "evaluate.py").is_file()]
    try:
        sys.modules["evaluate"] = _LOADED.get("evaluate") or importlib.import_module("evaluate")
        yield _LOADED.setdefault("evaluate", sys.modules["evaluate"])
    finally:
        sys.path[:] = paths
        sys.modules.pop("evaluate", None)
        if own is not None:
            sys.modules["evaluate"] = own
