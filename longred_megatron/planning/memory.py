"""Bytes of every rank by part, at the moment of a step when they are most."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import NamedTuple

from longred_megatron.families import Architecture
from longred_megatron.objectives.base import Objective, Site, Tap
from longred_megatron.planning.operations import (
    FUSED,
    PLAIN,
    Cost,
    Implementation,
    Numbers,
    Operation,
    Tokens,
    Widths,
    cost,
    recomputed,
    without_graph,
)
from longred_megatron.planning.order import replica_orders
from longred_megatron.planning.parameters import MATRICES, ChunkModel, buffer_elements, elements, stage_chunks
from longred_megatron.planning.saving import export_bytes
from longred_megatron.planning.schedule import stage_passes
from longred_megatron.precision import GRADIENT_BYTES, Precision
from longred_megatron.recipe import Phase

Bytes = dict[str, float]


class Peak(NamedTuple):
    """The fullest moment of a rank."""

    moment: str
    parts: Bytes

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class RankMemory:
    """Bytes of the ranks of one pipeline stage: at the end of each kind of work its fullest moment."""

    stage: int
    resident: Bytes = field(repr=False)
    peaks: tuple[Peak, ...]

    @property
    def peak(self) -> Peak:
        """The fullest of all."""
        return max(self.peaks, key=lambda peak: peak.total)


class ChunkCost(NamedTuple):
    """Of one micro-batch in one chunk: what is kept from its forward to its backward pass, and both peaks, with it."""

    kept: float
    forward: float
    backward: float


def fullest_rank(phase: Phase, world_size: int, gpu: bool) -> RankMemory:
    """The memory of the pipeline stage that needs most, of ranks on GPUs or on CPUs."""
    stages = range(phase.recipe.parallel.pipeline)
    found = (StageMemory(phase, world_size, stage, FUSED if gpu else PLAIN).memory() for stage in stages)
    return max(found, key=lambda each: each.peak.total)


class StageMemory:
    """The memory of one stage's ranks in a phase. world_size: ranks of the whole run."""

    def __init__(self, phase: Phase, world_size: int, stage: int, implementation: Implementation) -> None:
        self.phase, self.stage, self.how = phase, stage, implementation
        recipe = phase.recipe
        self.parallel, self.size = recipe.parallel, recipe.precision.number_bytes
        p = self.parallel
        self.replicas = world_size // (p.tensor * p.pipeline * p.context)
        self.chunks = stage_chunks(phase.source, p, stage)
        self.cost = cache(self._chunk_cost)
        self.memory = cache(self._memory)
        self.targets, self.head_target = cache(self._targets), cache(self._head_target)
        self.teacher_working = cache(self._teacher_working)

    @cached_property
    def resident(self) -> Bytes:
        """What is there all the time."""
        recipe, parts, p = self.phase.recipe, self.phase.recipe.training.trainable, self.parallel
        ranks = self.replicas * p.context
        buffers = buffer_elements(self.chunks, parts, ranks)
        frozen = elements(self.chunks) - elements(self.chunks, parts)
        fp8, of_teacher = recipe.precision.fp8_weight_bytes, recipe.precision.of_teacher().fp8_weight_bytes
        taught = [elements(own) for _, own in self.teacher_chunks]
        copies = fp8 * elements(self.chunks, MATRICES)  # of a teacher, which has no backward pass, not the transposed
        copies += sum(of_teacher / 2 * elements(own, MATRICES) for _, own in self.teacher_chunks)
        return {
            "weights": self.size * (buffers + frozen),
            "gradients": GRADIENT_BYTES * buffers,
            "optimizer": recipe.precision.optimizer_bytes * buffers / ranks,
            "teacher": self.size * sum(taught),
            "fp8 weights": copies,
        }

    @cached_property
    def teacher_chunks(self) -> list[tuple[Architecture, list[ChunkModel]]]:
        """Each teacher that has to run, and its chunks on this stage up to the deepest layer that a loss needs."""
        found, p = [], self.parallel
        for hf, teacher in self.phase.teachers.items():
            taught = self.phase.taught_by(hf)
            depth = max(map(self.phase.teacher_depth, taught))
            head = any(map(self.phase.teacher_head, taught))
            if not (depth or head):
                continue
            teacher = replace(teacher, vocab_size=self.phase.source.vocab_size)  # cut as the student's head is
            layout = p.of_teacher(teacher.num_layers)
            found.append((teacher, stage_chunks(teacher, layout, self.stage, depth=depth, head=head, copy=False)))
        return found

    @cached_property
    def orders(self) -> list[tuple[str, ...]]:
        """The objectives of a step's micro-batches, of each different data-parallel replica."""
        counts = {name: objective.microbatches for name, objective in self.phase.recipe.objectives.items()}
        return replica_orders(counts, self.phase.needs, self.replicas)

    def _memory(self) -> RankMemory:
        """Of a rank of the replica that needs most."""
        resident = self.resident
        passes = max((self._passes_peak(own, resident) for own in self.orders), key=lambda peak: peak.total)
        gathered = export_bytes(self.chunks, self.parallel.tensor, self.size)
        export = Peak("the export", resident | {"gathered parameter": gathered, "buffers": self._buffers()})
        return RankMemory(self.stage, resident, (passes, self._optimizer_peak(resident), export))

    # The forward and backward passes.

    def _passes_peak(self, order: Sequence[str], resident: Bytes) -> Peak:
        """Walks through the stage's schedule."""
        pipelined = self.parallel.pipeline > 1
        targets = dict(enumerate(self.targets(name) for name in order)) if pipelined else {}
        waiting = sum(targets.values())
        best = self._teacher_peak(order, waiting) if pipelined else Peak("before the student's passes", {})
        kept: dict[tuple[int, int], float] = {}
        in_flight = 0.0  # their sum
        left = self.left_inputs
        newest = dict.fromkeys(left, -1)  # by chunk: its last micro-batch; -1: of the step before
        schedule = stage_passes(self.stage, self.parallel.pipeline, len(self.chunks), len(order))
        for chunk, number, backward in schedule:
            name = order[number]
            if not pipelined and not backward:
                targets[number] = waiting = self.targets(name)
                asked = {"targets": targets[number], "activations": self.teacher_working(name)}
                best = max(best, Peak(f"the teacher's pass of {name}", asked), key=lambda peak: peak.total)
            own, others = self.cost(chunk, name), in_flight - kept.get((chunk, number), 0.0)
            if not backward:
                newest[chunk] = number
            through = sum(size for at, size in left.items() if (at, newest[at]) not in kept and at != chunk)
            now = others + (own.backward if backward else own.forward) + through
            # A loss's backward pass is the first, and then its targets are free.
            held = waiting - (targets.get(number, 0.0) if backward and chunk == 0 else 0.0)
            if held + now > best.total:
                way = "backward" if backward else "forward"
                moment = f"{way} pass of {name}, {len(kept) + (not backward)} in flight"
                best = Peak(moment, {"targets": held, "activations": now})
            if backward:
                in_flight -= kept.pop((chunk, number))
                if chunk == 0:
                    waiting -= targets.pop(number, 0.0)
            else:
                kept[chunk, number] = own.kept
                in_flight += own.kept
                if chunk == len(self.chunks) - 1 and number in targets:
                    done = self.head_target(name)
                    targets[number], waiting = targets[number] - done, waiting - done
        return Peak(best.moment, resident | best.parts | {"inputs": self._inputs(order), "buffers": self._buffers()})

    def _teacher_peak(self, order: Sequence[str], targets: float) -> Peak:
        working = max(map(self.teacher_working, set(order)), default=0.0)
        return Peak("the teachers' passes", {"targets": targets, "activations": working})

    def _teacher_working(self, name: str) -> float:
        """While a frozen layer runs: nothing is kept, each operation has its input and its output."""
        site = self.phase.sites[name]
        if not self.phase.teacher_depth(name):
            return 0.0
        tokens = self.tokens(self.phase.recipe.objectives[name], site)
        operations = self.layer_operations(site.teacher, tokens, self.phase.recipe.precision.of_teacher())
        return (
            without_graph(operations)
            + tokens.own * site.teacher.hidden_size * self.size
            + self._table(tokens, site.teacher)
        )

    def _targets(self, name: str) -> float:
        """Bytes of a micro-batch's values of the teacher on this stage."""
        return sum(self._tap_bytes(tap, self.phase.sites[name].teacher, name) for tap in self._teacher_taps(name))

    def _head_target(self, name: str) -> float:
        """Of these, what the loss of the head alone needs, and only while it runs."""
        needs = self.phase.needs[name]
        alone = (tap for tap in self._teacher_taps(name) if tap not in needs.pairs.values())
        return sum(self._tap_bytes(tap, self.phase.sites[name].teacher, name) for tap in alone)

    def _teacher_taps(self, name: str) -> Iterator[Tap]:
        depth = self.phase.sites[name].teacher.num_layers
        stages = self.parallel.for_depth(depth).layer_stages(depth)
        return (tap for tap in self.phase.needs[name].kept_taps(depth) if stages[tap.layer] == self.stage)

    def _tap_bytes(self, tap: Tap, model: Architecture, name: str) -> float:
        tokens = self.tokens(self.phase.recipe.objectives[name], self.phase.sites[name])
        if tap.what in ("hidden", "attention_output"):
            return tokens.own * model.hidden_size * self.size
        few = self.phase.needs[name].teacher_entries
        if few and tap == few.tap:
            return tokens.all * few.token_bytes
        heads = model.num_attention_heads if tap.what == "query" else model.num_kv_heads
        return tokens.all * heads * model.head_dim * self.size / self.parallel.tensor

    def layer_operations(self, model: Architecture, tokens: Tokens, precision: Precision) -> list[Operation]:
        """Of one layer, in order."""
        kept = precision.kept_input_bytes, precision.kept_copy_bytes, *precision.kept_attention_bytes
        return self.how.layer(Widths.of(model, self.parallel.tensor), tokens, Numbers(self.size, *kept))

    def tokens(self, objective: Objective, site: Site) -> Tokens:
        """Of a micro-batch of the objective."""
        p = self.parallel
        all_tokens = site.rank_tokens
        own = all_tokens / (p.tensor if p.sequence else 1)
        if not self._is_cut(objective):
            return Tokens(all_tokens, own, all_tokens)
        # Two pieces of each sequence a rank, of which one sees the beginning and one nearly all: (2 c + 1) / 2 c of it.
        share = objective.sequence_length / (2 * p.context)
        sequences = site.tokens_per_microbatch / objective.sequence_length
        keys = sequences * share * (2 * p.context + 1)
        return Tokens(all_tokens, own, keys, 4 * share * share * (2 * p.context + 1))

    def _table(self, tokens: Tokens, model: Architecture) -> float:
        return 4 * tokens.all * model.head_dim

    def _chunk_cost(self, number: int, name: str) -> ChunkCost:
        """Of a micro-batch of the objective `name` in chunk `number` of the stage."""
        pieces = list(self._pieces(self.chunks[number], name))
        kept = forward = backward = 0.0
        for each in pieces:
            forward = max(forward, kept + each.forward)
            backward = max(backward, kept + each.backward)
            kept += each.kept
        return ChunkCost(kept, forward, backward)

    def _pieces(self, chunk: ChunkModel, name: str) -> Iterator[Cost]:
        recipe, site, needs = self.phase.recipe, self.phase.sites[name], self.phase.needs[name]
        tokens = self.tokens(recipe.objectives[name], site)
        model, size = self.phase.source, self.size
        state = tokens.own * model.hidden_size * size
        operations = self.layer_operations(model, tokens, recipe.precision)
        recompute = recipe.training.recompute
        table = self._table(tokens, model)
        yield Cost(table, table + state, 0.0)
        layer = recomputed(operations, state, recompute)
        taps = [tap for tap in needs.pairs if tap.layer in chunk.layers]
        for number in chunk.layers:
            # The loss's backward pass comes first: gradients of its values wait for their layers'.
            waiting = sum(self._tap_bytes(tap, model, name) for tap in taps if tap.layer < number)
            yield layer._replace(backward=layer.backward + waiting)
        if chunk.last:
            yield cost([self.how.norm(model.hidden_size, tokens.own, size)])
        if taps:
            yield self._tapped(taps, chunk, operations, name)
        if chunk.last and needs.student_head:
            yield self._head_loss(chunk, tokens, name)

    def _tapped(self, taps: Sequence[Tap], chunk: ChunkModel, operations: Sequence[Operation], name: str) -> Cost:
        """What losses of values inside a chunk keep: the values, where nothing else does, and what they are made of."""
        model = self.phase.source
        attention = sum(op.kept for op in operations if op.part == "attention")
        norm = next(op.kept for op in operations if op.part == "norm")
        kept = made = 0.0
        for tap in taps:
            held = tap.what == "hidden" and tap.layer != chunk.layers[-1]
            final = tap == Tap(model.num_layers)  # kept by the final norm
            kept += 0.0 if held or final else self._tap_bytes(tap, model, name)
        for layer in {tap.layer for tap in taps if tap.what != "hidden"}:  # made a second time, from the layer's input
            whole = Tap(layer, "attention_output") in taps
            kept += norm + (attention if whole else 0.0)
            made += 0.0 if whole else attention
        working = self.phase.recipe.objectives[name].working_bytes(self.phase.sites[name]) if made else 0.0
        state = max(self._tap_bytes(tap, model, name) for tap in taps)
        return Cost(kept, kept + made + working + 2 * state, kept + 3 * state)

    def _head_loss(self, chunk: ChunkModel, tokens: Tokens, name: str) -> Cost:
        """Both gradients are made in the forward pass, the weight's in fp32; see kernels/linear_loss.py."""
        recipe, site, model = self.phase.recipe, self.phase.sites[name], self.phase.source
        rows = -(-model.vocab_size // self.parallel.tensor)
        trainable = recipe.training.trainable
        trained = trainable is None or ("embedding" if model.tied_embeddings else "head") in trainable
        hidden = tokens.all * model.hidden_size * self.size
        weight = rows * model.hidden_size * 4.0 if trained else 0.0
        kept = hidden + weight
        gathered = hidden if tokens.own < tokens.all else 0.0
        handed = weight / 4 * self.size
        return Cost(kept, kept + gathered + recipe.objectives[name].working_bytes(site), kept + handed)

    def _inputs(self, order: Sequence[str]) -> float:
        """The step's micro-batches, where they are copied to a device or cut for a context rank: tokens, labels and one
        or two rows of positions, int64."""
        rows = {name: 4 if needs.teacher else 3 for name, needs in self.phase.needs.items()}
        copied = (name for name in order if self.how.inputs_moved or self._is_cut(self.phase.recipe.objectives[name]))
        return sum(8 * rows[name] * self.phase.sites[name].rank_tokens for name in copied)

    def _is_cut(self, objective: Objective) -> bool:
        """Whether context ranks share its sequences."""
        return self.parallel.context > 1 and not objective.whole_sequences

    def _state(self, model: Architecture) -> float:
        """Hidden states of a micro-batch, as one stage sends them to the next."""
        p = self.parallel
        tokens = self.phase.recipe.step.tokens_per_microbatch / p.context / (p.tensor if p.sequence else 1)
        return tokens * model.hidden_size * self.size

    @cached_property
    def left_inputs(self) -> dict[int, float]:
        """By chunk: what its module still has of its last micro-batch when that is through, the input that came from
        another stage and its gradient (Megatron's `TransformerBlock.input_tensor`)."""
        pipelined = self.parallel.pipeline > 1
        return {i: 2 * self._state(self.phase.source) for i, c in enumerate(self.chunks) if pipelined and not c.first}

    def _buffers(self) -> float:
        """Megatron's buffer for the tokens of all tensor ranks, one for all layers; what has come from the stages
        before and after, a state and a gradient; and the teachers' last inputs."""
        p, model = self.parallel, self.phase.source
        inner = bool(p.virtual_pipeline)
        neighbours = (self.stage > 0 or inner) + (self.stage < p.pipeline - 1 or inner)
        messages = neighbours * self._state(model)
        messages += sum(
            self._state(teacher) for teacher, own in self.teacher_chunks for c in own if c.layers and not c.first
        )
        widest = max([model, *self.phase.teachers.values()], key=lambda each: each.hidden_size)
        return (messages if p.pipeline > 1 else 0.0) + (p.tensor * self._state(widest) if p.sequence else 0.0)

    def _optimizer_peak(self, resident: Bytes) -> Peak:
        ranks = self.replicas * self.parallel.context
        largest = max((p.elements for chunk in self.chunks for p in chunk.parameters), default=0)
        share = min(largest, buffer_elements(self.chunks, None, ranks) / ranks)
        buffers = self._buffers() + sum(self.left_inputs.values())
        return Peak(
            "the optimizer's step",
            resident | {"optimizer temporaries": 4 * self.how.optimizer_copies * share, "buffers": buffers},
        )
