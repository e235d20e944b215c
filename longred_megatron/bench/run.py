"""Runs comparisons: both sides of a case by turns, and after each case the results to the folder."""

import difflib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from inspect import isabstract
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from transformers.utils.logging import disable_progress_bar

from longred_megatron import bench
from longred_megatron.bench.base import Case, Comparison, Facts, Side, Sizes
from longred_megatron.bench.process import CaseError, Processes, Repeat, preload
from longred_megatron.bench.report import write_report
from longred_megatron.bench.results import Result, Timed
from longred_megatron.device import on_gpu
from longred_megatron.dtypes import DTYPES
from longred_megatron.errors import UserError, listed, plain

MOST_REPEATS = 1000
Tell = Callable[[str], None]
"""Shows a line of progress."""


def comparisons() -> dict[str, Comparison]:
    """Every comparison by its name, in the order of their files."""
    found: dict[str, Comparison] = {}
    for module in sorted(info.name for info in iter_modules(bench.__path__)):
        for value in vars(import_module(f"{bench.__name__}.{module}")).values():
            is_one = isinstance(value, type) and issubclass(value, Comparison) and not isabstract(value)
            if is_one and value.__module__ == f"{bench.__name__}.{module}":
                found[value.name] = value()
    return found


def chosen(names: Sequence[str]) -> dict[str, Comparison]:
    """Those named, all without names. Raises UserError for a name that is none."""
    known = comparisons()
    problems = []
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)
            problems.append(f"{name}: no such comparison; did you mean {nearest[0]}? There are {listed(known)}")
    if problems:
        raise UserError(*problems)
    return {name: each for name, each in known.items() if name in names or not names}


def changed_sizes(sizes: Sizes, changes: Sequence[str]) -> Sizes:
    """`sizes` with changes such as "sequence_length=4096". Raises UserError for unknown keys and wrong values."""
    values: dict[str, Any] = sizes.model_dump()
    problems = []
    for change in changes:
        key, _, text = change.partition("=")
        if key not in values:
            [nearest] = difflib.get_close_matches(key, values, n=1, cutoff=0)
            problems.append(f"{change}: no such size; did you mean {nearest}? There are {listed(values)}")
            continue
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            problems.append(f"{change}: the value cannot be read; give a number, or a list such as [4,1,3]")
    try:
        sizes = Sizes.model_validate(values)
    except ValidationError as error:
        for each in error.errors():
            where = "".join(f"{part}=" for part in each["loc"][:1]) + (f"{each['input']}: " if each["loc"] else "")
            problems.append(where + each["msg"].removeprefix("Value error, "))
    if problems:
        raise UserError(*problems)
    return sizes


class Bench:
    """A run of comparisons on this machine. repeats: of each side of a case, after one that is not counted."""

    def __init__(self, sizes: Sizes, repeats: int, tell: Tell) -> None:
        if not 1 <= repeats <= MOST_REPEATS:
            raise UserError(f"--repeats {repeats}: must be 1 to {MOST_REPEATS}")
        preload([type(each).__module__ for each in comparisons().values()])
        disable_progress_bar()  # transformers', for models that are written in a second
        self._sizes, self._repeats, self._tell = sizes, repeats, tell
        self._peaks: dict[str, float] = {}  # FLOP/s of this machine's product, by number format
        self.results: list[Result] = []

    def run(self, wanted: Mapping[str, Comparison], output: Path | None, command: str) -> None:
        """Runs them one after another; `output` gets the results after each case."""
        for name, comparison in wanted.items():
            self._tell(f"{name}: {comparison.__doc__}")
            with tempfile.TemporaryDirectory(prefix=f"bench-{name}-") as folder:
                for case in comparison.cases(self._sizes, Path(folder)):
                    self.results.append(self._measured(name, case))
                    if output is not None:
                        write_report(output, self.results, self._peaks, self._sizes, command)

    def _measured(self, name: str, case: Case) -> Result:
        peak = self._peak(case.dtype) if case.flops else None
        work, flops = case.reference_work or case.work, case.reference_flops or case.flops
        ours, reference = Timed([], 0, case.work, case.flops), Timed([], 0, work, flops)
        facts: dict[str, tuple[float, float]] = {}
        problem = ""
        try:
            with (
                Processes("ours", case.ours, case.ours_ranks) as our_processes,
                Processes("the reference", case.reference) as its_processes,
            ):
                sides = (our_processes, its_processes)
                facts = common_facts(*(side.repeat().facts for side in sides))
                check_facts(facts, case.tolerance)
                mine, its = alternate(sides, self._repeats)
            ours, reference = (
                replace(timed, seconds=[each.seconds for each in repeats], peak_bytes=repeats[-1].peak_bytes)
                for timed, repeats in ((ours, mine), (reference, its))
            )
        except CaseError as error:
            problem = plain(str(error))
        devices = case.ours_ranks if on_gpu() else 1
        result = Result(name, case.setting, case.unit, peak, devices, facts, ours, reference, problem)
        self._tell("  " + _line(result))
        return result

    def _peak(self, dtype: str) -> float:
        """FLOP/s of a product of square matrices, the best of several; measured once a run."""
        if dtype not in self._peaks:
            size = self._sizes.matrix_size * (2 if on_gpu() else 1)
            with Processes("product", partial(MatrixProduct, size, dtype)) as process:
                seconds = min(process.repeat().seconds for _ in range(5))
            self._peaks[dtype] = 2 * size**3 / seconds
            self._tell(f"peak of {dtype} products of {size}: {self._peaks[dtype] / 1e12:.3g} TFLOP/s")
        return self._peaks[dtype]


class MatrixProduct(Side):
    """A product of two square matrices: what the machine can do."""

    def __init__(self, size: int, dtype: str) -> None:
        device = torch.device("cuda" if on_gpu() else "cpu")
        self._left, self._right = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))

    def once(self) -> None:
        self._left @ self._right


def alternate(sides: Sequence[Processes], repeats: int) -> list[list[Repeat]]:
    """The repeats of each of two sides, in order; each is the first one in every other pair."""
    found: list[list[Repeat]] = [[], []]
    for number in range(repeats):
        for i in (0, 1) if number % 2 == 0 else (1, 0):
            found[i].append(sides[i].repeat())
    return found


def common_facts(ours: Facts, reference: Facts) -> dict[str, tuple[float, float]]:
    """What both sides say."""
    return {name: (value, reference[name]) for name, value in ours.items() if name in reference}


def check_facts(facts: Mapping[str, tuple[float, float]], tolerance: float) -> None:
    """Raises CaseError where the two differ by more than `tolerance`, relative: they did not do the same work."""
    different = [
        f"{name} is {ours:.6g} and {theirs:.6g}"
        for name, (ours, theirs) in facts.items()
        if not abs(ours - theirs) <= tolerance * max(abs(theirs), 1e-6)
    ]
    if different:
        raise CaseError(f"ours and the reference differ: {listed(different)}")


def _line(result: Result) -> str:
    if result.problem:
        return f"{result.setting}: {result.problem}"
    memory = "" if result.memory_ratio is None else f", {result.memory_ratio:.2f} of its memory"
    return f"{result.setting}: {result.ratio:.2f} times the reference's speed{memory}"
