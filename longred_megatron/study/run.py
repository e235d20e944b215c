"""A study from its members to its report."""

from collections.abc import Sequence
from string import Template

from tqdm import tqdm

from longred_megatron.errors import UserError, first_few
from longred_megatron.evaluation.texts import text_source
from longred_megatron.families import read_architecture
from longred_megatron.study.measure import Measured, Measurer
from longred_megatron.study.members import Merged, Trained
from longred_megatron.study.report import write_report
from longred_megatron.study.results import ORIGINAL, verdict
from longred_megatron.study.settings import StudyFile


def chosen(study: StudyFile, members: Sequence[Trained | Merged], only: Sequence[str] | None) -> list[Trained | Merged]:
    """The members of the runs, merges and rows in `only`, and of the runs they need; all of them without it.

    Raises UserError for a name that the study does not have.
    """
    if only is None:
        return list(members)
    known = {*study.runs, *study.merges, *study.rows()} - {ORIGINAL}
    if unknown := [name for name in only if name not in known]:
        raise UserError(f"--only {first_few(unknown)}: the study has no such run; it has {', '.join(sorted(known))}")
    rows = {member.row for member in members if member.row in only or member.row.rpartition("-")[0] in only}
    needed = {merge.run for name, merge in study.merges.items() if any(row.startswith(f"{name}-") for row in rows)}
    for name in reversed(study.runs):  # a run needs earlier ones alone
        if name in rows | needed:
            needed |= {each for text in study.runs[name].overrides for each in Template(text).get_identifiers()}
    return [member for member in members if member.row in rows | needed]


def check_inputs(study: StudyFile) -> None:
    """Raises UserError, before anything is made, when the original or the texts cannot be read."""
    read_architecture(study.original)
    for texts in (study.evaluation.short_texts, study.evaluation.long_texts):
        text_source(texts)


def measure_and_report(study: StudyFile, members: Sequence[Trained | Merged], command: str) -> str:
    """Measures the original and every member that is a row, and writes the report; returns its tables."""
    rows = [member for member in members if member.row in study.rows()]
    measurer = Measurer(study.original, [member.hf for member in rows], study.evaluation)
    found: dict[str, list[Measured]] = {
        ORIGINAL: [measurer.measure(study.original, study.dir / "runs" / "original.measured.json")]
    }
    for member in tqdm(rows, desc="measuring", unit=" models", disable=None):
        path = member.hf.parent.with_name(f"{member.hf.parent.name}.measured.json")
        found.setdefault(member.row, []).append(measurer.measure(member.hf, path))
    present = [each for each in study.orderings if {each.better, each.than} <= found.keys()]
    return write_report(study, found, [verdict(found, ordering) for ordering in present], command)
