"""One token is changed: no earlier output may change, and none of another document.

The small copy's training pass runs, with the recipe's recomputation and layout, on a step's micro-batches as they are
and with one token of every sequence changed; each rank of the last stage compares the final hidden states that it
holds. What leaks anywhere below shows there. Documents are told apart in packs of the probe's own, whatever the recipe
does: the question is what the machine does with borders. The token is the last of a sequence, one in its middle, and
the first and last of a document in the middle of a pack, where a border that is off by one shows.

What may differ where nothing should: on the CPU 1e-6 of the outputs' size, since rows of a product are computed apart,
and a library may still choose another kernel by where a tensor lies in memory; elsewhere 2^-8, a rounding of bf16, or
four times what two equal passes differ by (the control), whichever is larger. A token that is seen has a share of some
1 / sequence_length in what sees it, far above. FP8 with one scale for many tokens does change earlier outputs, by as
much as FP8 rounds: a changed token changes the scale (Transformer Engine issue 3248). So there the limit is four
roundings of E4M3, and masks are what bf16 shows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longred_megatron.device import on_gpu
from longred_megatron.doctor.findings import Finding, not_tried
from longred_megatron.doctor.patient import Patient
from longred_megatron.doctor.team import Report
from longred_megatron.model.fp8 import forget_models
from longred_megatron.parallel.context import cut_for_context_rank
from longred_megatron.parallel.groups import initialize
from longred_megatron.recipe import load_recipe, read_phases
from longred_megatron.training.microbatches import MicroBatch, MicroBatchSource
from longred_megatron.training.run import PhaseRun, build

FLOOR_ON_CPU, FLOOR, FP8_FLOOR = 1e-6, 2.0**-8, 4 * 2.0**-4
CONTROL_FACTOR = 4.0
SECONDS = 180.0


@dataclass
class Seen:
    """What one rank saw of an objective's micro-batches in one way of cutting and one kind of question.

    leak: the largest change where there should be none, in units of the outputs' root mean square; where: the sequence
    and place of it. control: the same of two equal passes. rows, changed: outputs that may change, and that did.
    """

    objective: str
    cut: str
    question: str
    leak: float = 0.0
    where: str = ""
    control: float = 0.0
    rows: int = 0
    changed: int = 0

    @property
    def key(self) -> tuple[str, str, str]:
        return self.objective, self.cut, self.question


CAUSALITY, DOCUMENTS = "causality", "document borders"
REASONS = {
    CAUSALITY: "an output changes with a token after it: attention is not causal on this path, and training on it "
    "teaches the model to copy",
    DOCUMENTS: "an output changes with a token of another document: borders are not kept on this path",
}


def check(patient: Patient) -> Iterator[Finding]:
    """Every objective, cut over the context ranks and whole, in each number format that this machine has."""
    for name, small in patient.small.items():
        ranks = patient.team.run(probe, small, seconds=SECONDS)
        yield from judge([(rank["seen"], rank["skipped"]) for rank in ranks], name, patient.team.hosts)
    for name, why in patient.untried_formats().items():
        yield not_tried(f"probes in {name}", why)


def probe(report: Report, small: Path) -> dict[str, Any]:
    """seen: this rank's `Seen`, as dictionaries; skipped: {what could not be probed: why}."""
    recipe = load_recipe(small)
    groups = initialize(recipe.parallel, recipe.training.seed)
    found: list[Seen] = []
    skipped: dict[str, str] = {}
    for phase in read_phases(recipe):
        forget_models()
        fp8_attention = phase.recipe.precision.fp8_attention
        run = build(phase, MicroBatchSource(phase), groups)
        microbatches = run.data.step(1, groups.dp.rank(), groups.dp.size())
        for cut, ways, why in _ways(microbatches, groups.cp.size()):
            skipped |= why
            if fp8_attention:
                skipped["document borders"] = "FP8 attention does not train on packed documents"
            report(f"phase {phase.number}, {cut}")
            found += _leaks(run, ways, cut)
            if not fp8_attention:
                packs = [replace(m, documents=[_documents(m.tokens.shape[1])] * len(m.tokens)) for m in ways]
                found += _leaks(run, packs, cut, own_documents=True)
    return {"seen": [asdict(each) for each in found], "skipped": skipped}


def _ways(microbatches: Sequence[MicroBatch], context: int) -> Iterator[tuple[str, list[MicroBatch], dict[str, str]]]:
    """(how sequences lie on the context ranks, the micro-batches, what cannot lie so and why)."""
    if context == 1:
        yield "not cut", list(microbatches), {}
        return
    for whole in (False, True):
        name = "whole sequences" if whole else f"cut over {context} ranks"
        own, why = [], {}
        for m in microbatches:
            num_sequences, length = m.tokens.shape
            fits = num_sequences % context == 0 if whole else length % (2 * context) == 0
            if fits:
                m = replace(m, settings=m.settings.model_copy(update={"whole_sequences": whole}))
            else:
                why[f"{m.objective}, {name}"] = f"{num_sequences} x {length} tokens do not lie so on {context} ranks"
            own.append(m)
        yield name, own, why


def _documents(length: int) -> list[int]:
    """Three documents, of lengths that no block of a kernel has and of two tokens at least; fewer where so many tokens
    are not there."""
    first = min(length, max(2, length // 3 - 1))
    second = min(length - first, max(2, length // 2 - 1))
    return [size for size in (first, second, length - first - second) if size > 0]


def _leaks(run: PhaseRun, microbatches: list[MicroBatch], cut: str, own_documents: bool = False) -> list[Seen]:
    before, again = outputs(run, microbatches), outputs(run, microbatches)
    found: dict[tuple[str, str, str], Seen] = {}
    for place in ("document's last", "document's first") if own_documents else ("last", "middle"):
        changed, places = zip(*(_changed(m, place) for m in microbatches), strict=True)
        after = outputs(run, list(changed))
        for m, at, a, b, c in zip(microbatches, places, before, again, after, strict=False):  # nothing on other stages
            rows = _local_rows(run, m)
            for question, untouched, touched in _questions(m, at):
                way = f"{cut}, {'whole' if m.settings.whole_sequences else 'cut'}" if run.groups.cp.size() > 1 else cut
                one = Seen(m.objective, way, question)
                seen = found.setdefault(one.key, one)
                _compare(seen, a, b, c, untouched.flatten()[rows], touched.flatten()[rows], rows, m.tokens.shape[1])
    return list(found.values())


def _changed(m: MicroBatch, place: str) -> tuple[MicroBatch, int]:
    """The micro-batch with one token of each sequence changed into another, and the token's place."""
    length = m.tokens.shape[1]
    if place in ("last", "middle"):
        at = length - 1 if place == "last" else length // 2
    else:
        assert m.documents is not None
        ends = list(accumulate(m.documents[0]))
        middle = len(ends) // 2
        at = ends[middle] - 1 if place == "document's last" else ends[middle] - m.documents[0][middle]
    tokens = m.tokens.clone()
    tokens[:, at] = (tokens[:, at] + 1) % (int(m.tokens.max()) + 1)
    return replace(m, tokens=tokens), at


def _questions(m: MicroBatch, at: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(question, [sequences, sequence_length] outputs that may not change, those that may)."""
    num_sequences, length = m.tokens.shape
    later = (torch.arange(length) >= at).expand(num_sequences, -1)
    if m.documents is None:
        yield CAUSALITY, ~later, later
        return
    numbers = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in m.documents])
    same = numbers == numbers[:, at : at + 1]
    yield CAUSALITY, same & ~later, same & later
    yield DOCUMENTS, ~same, same & later


def _local_rows(run: PhaseRun, m: MicroBatch) -> Tensor:
    """Which tokens of the micro-batch, counted sequence after sequence, this rank's outputs belong to."""
    groups, whole = run.groups, m.settings.whole_sequences
    numbers = torch.arange(m.tokens.numel()).view(m.tokens.shape)
    own = cut_for_context_rank(numbers, groups.cp.rank(), groups.cp.size(), whole).flatten()
    return own.chunk(groups.tp.size())[groups.tp.rank()] if run.phase.recipe.parallel.sequence else own


def outputs(run: PhaseRun, microbatches: list[MicroBatch]) -> list[Tensor]:
    """The student's final hidden states of each micro-batch in a training pass, [this rank's tokens, hidden], fp32;
    empty on ranks that do not hold the last stage."""
    kept: list[Tensor] = []

    def keep(module: Any, arguments: Any, result: tuple[Tensor, Any]) -> None:
        if torch.is_grad_enabled():  # not where the student is its own teacher
            kept.append(result[0].detach().squeeze(1).float().cpu().clone())

    hooks = [chunk.register_forward_hook(keep) for chunk in run.chunks if chunk.post_process]
    run.train_step.forward_backward(microbatches)
    for hook in hooks:
        hook.remove()
    return kept


def _compare(
    seen: Seen,
    before: Tensor,
    again: Tensor,
    after: Tensor,
    untouched: Tensor,
    touched: Tensor,
    rows: Tensor,
    length: int,
) -> None:
    """Adds one pair of passes to what was seen. before, again, after: [this rank's tokens, hidden]."""
    size = float(before.square().mean().sqrt())
    change, noise = ((x - before).abs().amax(1) / size for x in (after, again))
    seen.rows += int(touched.sum())
    seen.changed += int((change[touched] > 0).sum())
    if not untouched.any():
        return
    seen.control = max(seen.control, float(noise.max()))
    largest = change.masked_fill(~untouched, 0).nan_to_num(torch.inf)
    if (leak := float(largest.max())) > seen.leak:
        sequence, place = divmod(int(rows[int(largest.argmax())]), length)
        seen.leak, seen.where = leak, f"token {place} of sequence {sequence}"


def judge(
    ranks: Sequence[tuple[list[dict[str, Any]], dict[str, str]]], name: str, hosts: Sequence[str]
) -> list[Finding]:
    """A finding for each objective, way of cutting and question, over all ranks. name: of the number format."""
    found: dict[tuple[str, str, str], list[tuple[int, Seen]]] = {}
    for rank, (seen, _) in enumerate(ranks):
        for each in (Seen(**values) for values in seen):
            found.setdefault(each.key, []).append((rank, each))
    findings = [_finding(key, seen, name, hosts) for key, seen in found.items()]
    skipped = {what: why for _, own in ranks for what, why in own.items()}
    return findings + [not_tried(f"{what}, {name}", why) for what, why in skipped.items()]


def _finding(key: tuple[str, str, str], seen: list[tuple[int, Seen]], name: str, hosts: Sequence[str]) -> Finding:
    objective, cut, question = key
    title = f"{question}: {objective}, {cut}, {name}"
    floor = FP8_FLOOR if name == "fp8" else FLOOR if on_gpu() else FLOOR_ON_CPU
    limit = max(floor, CONTROL_FACTOR * max(each.control for _, each in seen))
    rank, worst = max(seen, key=lambda pair: pair[1].leak)
    rows, changed = sum(each.rows for _, each in seen), sum(each.changed for _, each in seen)
    numbers = {"leak": worst.leak, "limit": limit, "outputs_that_may_change": rows, "changed": changed}
    if not worst.leak <= limit:
        text = (
            f"{REASONS[question]} ({worst.leak:.1e} of its size at {worst.where}, limit {limit:.1e}; rank {rank} on "
            f"{hosts[rank]})"
        )
        change = (
            "do not train on this machine: compare its Transformer Engine and cuDNN with constraints.txt, look whether "
            "LONGRED_DEVICE=cpu leaks too, and report it with results.json"
        )
        return Finding(title, "wrong", text, change, numbers)
    if not changed:
        text = "no output changed at all, not even that of the changed token: the probe cannot see"
        return Finding(title, "wrong", text, "report it with results.json", numbers)
    text = f"largest forbidden change {worst.leak:.1e}, limit {limit:.1e}; {changed} of {rows} allowed ones seen"
    return Finding(title, "ok", text, numbers=numbers)
