"""Runs every check on the ranks that there are, and says what they found."""

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from longred_megatron.device import on_gpu
from longred_megatron.doctor import environment, links, parity, probes, real_widths, resume
from longred_megatron.doctor.findings import Finding, RanksFailedError, TimeUpError, not_tried, of_failure
from longred_megatron.doctor.patient import Patient
from longred_megatron.doctor.team import Team
from longred_megatron.errors import UserError
from longred_megatron.files import try_output
from longred_megatron.parallel.world import world
from longred_megatron.recipe import Phase, Recipe, check_phases, dump_recipe, read_phases
from longred_megatron.training.small_copy import Sizes, small_copy, without_fp8, without_gpu

SECONDS = 600.0  # for everything
STEPS = 6  # of the small copy: three before its checkpoint and three after it
# Heads of 128 dims, which is what kernels are made for and the only size that FP8 attention trains with. On a GPU also
# widths that FP8 products take, and sequences longer than a kernel's block of 64 or 128 tokens beside shorter ones.
CPU_SIZES = Sizes(head_dim=128, shortest_sequence=8)
GPU_SIZES = Sizes(head_dim=128, shortest_sequence=64, multiple=16)

Check = Callable[[Patient], Iterator[Finding]]
CHECKS: Mapping[str, Check] = {
    "Environment": environment.check,
    "Links": links.check,
    "Layout": parity.check,
    "Causality and document borders": probes.check,
    "Resume": resume.check,
    "Real widths": real_widths.check,
}


@dataclass(frozen=True)
class Section:
    """What one check found."""

    title: str
    findings: Sequence[Finding]


def examine(recipe: Recipe, tell: Callable[[str], None]) -> list[Section]:
    """Every rank calls it and gets the same sections.

    tell: shows a line of progress, on rank 0.

    Raises:
        UserError: the recipe cannot run on these ranks, or run.dir cannot be written.
    """
    disable_progress_bar()  # transformers', for models of no size
    multiprocessing.set_forkserver_preload([__name__])  # the checks' imports are paid for once, see `Team`
    phases, (_, size) = read_phases(recipe), world(os.environ)
    # What needs a GPU is said to be not tried without one.
    if problems := check_phases(phases, size, gpu=None if on_gpu() else True):
        ranks = recipe.parallel.tensor * recipe.parallel.pipeline * recipe.parallel.context
        if size % ranks:
            problems.append(f"start it with torchrun --nproc-per-node {ranks} tools/doctor.py, or more nodes of fewer")
        raise UserError(*problems)
    with tempfile.TemporaryDirectory(prefix="doctor-") as temporary:
        folder = Path(temporary)
        small = _write_small(recipe, phases, folder)  # before the ranks meet: then transformers lets one of them write
        team = Team(SECONDS)
        _all_on_one_device(team)
        with _beside(recipe.run.dir, team) as shared:
            return list(_sections(Patient(recipe, phases, small, team, folder, shared), tell))


def _sections(patient: Patient, tell: Callable[[str], None]) -> Iterator[Section]:
    is_main = patient.team.rank == 0
    for title, check in CHECKS.items():
        if is_main:
            tell(f"{title} ...")
        section = Section(title, _tried(title, check, patient))
        if is_main:
            for finding in section.findings:
                tell(line_of(finding))
        yield section


def leave() -> None:
    """Leaves the world when every rank, the one that writes the page too, has come here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # the world
        torch.distributed.destroy_process_group()


def line_of(finding: Finding) -> str:
    """A finding as text."""
    change = f"\n             change: {finding.change}" if finding.change else ""
    return f"  {finding.status:<9}  {finding.name}: {finding.text}{change}"


def verdict(sections: Sequence[Section]) -> str:
    """One line over all findings."""
    found = [finding for section in sections for finding in section.findings]
    counts = {status: sum(finding.status == status for finding in found) for status in ("ok", "wrong", "not tried")}
    rest = f"{counts['ok']} looked at and fine, {counts['not tried']} not tried"
    if not counts["wrong"]:
        return f"healthy: no fault found; {rest}"
    faults = "1 fault" if counts["wrong"] == 1 else f"{counts['wrong']} faults"
    names = ", ".join(finding.name for finding in found if finding.status == "wrong")
    return f"{faults} found ({names}); {rest}"


def is_healthy(sections: Sequence[Section]) -> bool:
    """Whether no check found a fault."""
    return all(finding.status != "wrong" for section in sections for finding in section.findings)


def _tried(title: str, check: Check, patient: Patient) -> list[Finding]:
    """What a check finds, up to where its processes failed."""
    found: list[Finding] = []
    try:
        found.extend(check(patient))  # what came before a failure stays
    except RanksFailedError as error:
        found.append(of_failure(title, error.failures))
    except TimeUpError:
        found.append(not_tried(title, f"the doctor's {SECONDS / 60:.0f} minutes were over"))
    return found


def _all_on_one_device(team: Team) -> None:
    devices = team.gather(on_gpu())
    if len(set(devices)) > 1:
        without = [f"rank {rank} on {team.hosts[rank]}" for rank, has in enumerate(devices) if not has]
        raise UserError(
            f"{', '.join(without[:8])}: no GPU, or no Transformer Engine that can be imported, while other ranks have "
            "both; mend these machines (tools/launch/check_environment.py), or set LONGRED_DEVICE=cpu everywhere"
        )


@contextmanager
def _beside(run: Path, team: Team) -> Iterator[Path]:
    """A new folder on the disk of run.dir, the same path on every rank. Removed at the end."""
    if team.rank == 0:
        try_output(run, "run.dir")
    parent = next(folder for folder in run.absolute().parents if folder.is_dir())
    path = Path(team.first(tempfile.mkdtemp(prefix=".doctor-", dir=parent) if team.rank == 0 else None))
    try:
        yield path
    finally:
        if team.rank == 0:
            shutil.rmtree(path, ignore_errors=True)


def _write_small(recipe: Recipe, phases: Sequence[Phase], folder: Path) -> dict[str, Path]:
    """The small copy's recipes in `folder`, by the number format that they compute in; see `Patient.small`.

    Each rank writes the same bytes, so that no two of them need a disk in common.
    """
    with_fp8, _ = small_copy(recipe, phases, folder, GPU_SIZES if on_gpu() else CPU_SIZES)
    for each in (with_fp8, *(with_fp8["phases"] or ())):
        each["training"] = each.get("training", {}) | {"steps": STEPS}
    plain = deepcopy(with_fp8)
    without_fp8(plain)
    if not on_gpu():
        without_gpu(plain)
        plain["precision"]["params"] = "fp32"
    formats = {plain["precision"]["params"]: plain}
    if on_gpu() and any(phase.recipe.precision.fp8 for phase in phases):
        formats["fp8"] = with_fp8
    paths = {}
    for name, values in formats.items():
        paths[name] = folder / f"{name}.yaml"
        paths[name].write_text(dump_recipe(Recipe.model_validate(values)), encoding="utf-8")
    return paths
