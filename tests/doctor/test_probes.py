"""A token that is seen from where it may not be is found; on the clean tree none is."""

from collections.abc import Callable
from pathlib import Path

import pytest

from longred_megatron.doctor.findings import Finding
from longred_megatron.doctor.probes import judge, probe
from tests.doctor import faults
from tests.doctor.ranks import Fault, on_ranks

CAUSALITY = {"causality: " + name for name in ("long_text", "short_to_long", "short_restoration")}
DOCUMENTS = {"document borders: " + name for name in ("long_text", "short_to_long", "short_restoration")}


def findings(path: Path, folder: Path, num_ranks: int = 1, fault: Fault | None = None) -> list[Finding]:
    ranks = on_ranks(num_ranks, probe, folder, path, fault=fault)
    return judge([(rank["seen"], rank["skipped"]) for rank in ranks], "fp32", ["here"] * num_ranks)


def wrong(found: list[Finding]) -> set[str]:
    return {finding.name.split(",")[0] for finding in found if finding.status == "wrong"}


def test_the_clean_tree_is_causal_and_keeps_borders(small: Callable[..., Path], tmp_path: Path) -> None:
    found = findings(small(), tmp_path)
    assert {finding.name.split(",")[0] for finding in found} == CAUSALITY | DOCUMENTS
    assert {finding.status for finding in found} == {"ok"}


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (faults.future_seen, CAUSALITY),
        # The small copy's other sequences are shorter than that fault needs.
        (faults.last_key_seen_by_the_one_before, {"causality: long_text"}),
        (faults.borders_ignored, DOCUMENTS),
        (faults.border_late_by_one, DOCUMENTS),
        (faults.border_early_by_one, DOCUMENTS),
    ],
)
def test_a_leak_is_found(fault: Fault, expected: set[str], small: Callable[..., Path], tmp_path: Path) -> None:
    found = wrong(findings(small(), tmp_path, fault=fault))
    assert expected <= found
    assert expected & CAUSALITY or found == expected


def test_sequences_that_ranks_share_or_hold_whole(small: Callable[..., Path], tmp_path: Path) -> None:
    found = findings(small("parallel.context=2"), tmp_path, num_ranks=2)
    ways = {finding.name.split(",")[1].strip() for finding in found}
    assert ways == {"cut over 2 ranks", "whole sequences"}
    # Its one sequence a micro-batch cannot lie on two ranks.
    assert {f.name for f in found if f.status == "not tried"} == {"long_text, whole sequences, fp32"}
    assert not wrong(found)


@pytest.mark.parametrize(
    ("fault", "expected"), [(faults.pieces_in_rank_order, CAUSALITY), (faults.borders_ignored, DOCUMENTS)]
)
def test_a_leak_between_ranks_is_found(
    fault: Fault, expected: set[str], small: Callable[..., Path], tmp_path: Path
) -> None:
    found = findings(small("parallel.context=2"), tmp_path, num_ranks=2, fault=fault)
    leaking = {each.name.split(",")[0] for each in found if each.status == "wrong" and "cut over" in each.name}
    assert expected <= leaking
