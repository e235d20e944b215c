"""Live bytes by part at the peak of one training step, on every rank of real runs on this machine's CPU.

`make plan-check` prints them beside the plan's, python -m tests.planning.measure.
"""

import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from longred_megatron.parallel.groups import destroy, initialize
from longred_megatron.parallel.local_ranks import run_ranks
from longred_megatron.planning.flops import step_flops
from longred_megatron.planning.gpus import read_gpu
from longred_megatron.planning.memory import StageMemory
from longred_megatron.planning.operations import PLAIN
from longred_megatron.planning.plan import plan_phase
from longred_megatron.recipe import Phase, load_recipe, read_phases
from longred_megatron.training.optimizer import set_hyperparameters
from longred_megatron.training.run import PhaseRun
from tests.checkpoint.small_models import write_model
from tests.objectives.examples import all_kinds
from tests.planning.live_tensors import LiveTensors
from tests.planning.messages import Messages
from tests.training.workspace import build_run, make_workspace, write_perturbed, write_recipe

# Widths that weigh as in real models: the MLP's, then the vocabulary's, are the largest; a micro-batch has more tokens
# than a layer has rows.
SIZES: dict[str, Any] = {
    "num_hidden_layers": 8,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "intermediate_size": 176,
    "vocab_size": 1000,
}
LARGE = SIZES | {"num_hidden_layers": 6, "hidden_size": 96, "vocab_size": 1010, "max_position_embeddings": 256}
OBJECTIVES: dict[str, Any] = {
    "long_text": {"microbatches": 4, "sequence_length": 256, "data": "texts"},
    "short_restoration": {
        "microbatches": 2,
        "sequence_length": 16,
        "data": "texts",
        "layers": [1, 3, 6, 8],
        "weight": 5,
    },
}
PACKED = {
    "packed_distillation": {"microbatches": 4, "sequence_length": 128, "data": "texts"},
    "long_text": None,
    "short_to_long": None,
    "short_restoration": None,
}
STEP = {"step": {"tokens_per_microbatch": 512}}


def _attention(query: Tensor, key: Tensor, *more: Any, **settings: Any) -> int:
    """Scores and weighted values of the pairs of tokens that causal attention sees; the queries are the last keys'."""
    sequences, heads, rows, head_dim = query.shape
    return int(2 * 2 * sequences * heads * head_dim * (rows * key.shape[2] - rows * rows / 2))


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, *more: Any, **settings: Any) -> int:
    """Twice the forward pass, as model FLOPs count it: a fifth product repeats the scores."""
    return 2 * _attention(query, key)


def _added_product(total: Tensor, left: Tensor, right: Tensor, **settings: Any) -> int:
    return 2 * left.numel() * right.shape[1]


# torch counts attention on a GPU alone, and no product that is added in place. Its counter hands tensors, not their
# shapes, to what is marked so.
for count in (_attention, _attention_backward, _added_product):
    count._get_raw = True  # type: ignore[attr-defined]
UNCOUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten.addmm_: _added_product,
}


@dataclass(frozen=True)
class Case:
    """One step of a recipe in a layout."""

    recipe: str
    world: int
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return " ".join([self.recipe, f"world={self.world}", *self.overrides])


def _cases() -> Iterator[Case]:
    def case(
        world: int, recipe: str = "restoration", recompute: str = "none", params: str = "fp32", **parallel: Any
    ) -> Case:
        settings = [f"parallel.{key}={str(value).lower()}" for key, value in parallel.items()]
        return Case(recipe, world, (*settings, f"training.recompute={recompute}", f"precision.params={params}"))

    yield case(1)
    yield case(1, recompute="full")
    yield case(1, recompute="selective")
    yield case(1, params="bf16")
    yield case(1, params="bf16", recompute="full")
    yield case(2)
    yield case(2, tensor=2)
    yield case(2, tensor=2, sequence=True)
    yield case(2, pipeline=2)
    yield case(2, pipeline=2, virtual_pipeline=2)
    yield case(2, pipeline=2, layers_per_chunk="[3, 5]", recompute="full")
    yield case(2, context=2)
    yield case(2, context=2, recompute="full")
    yield case(4, pipeline=4)
    yield case(4, pipeline=2, virtual_pipeline=4, context=2, recompute="full")
    yield case(4, tensor=2, pipeline=2, sequence=True, recompute="full")
    yield case(4, tensor=2, pipeline=2, sequence=True, recompute="selective", params="bf16")
    yield case(4, tensor=2, context=2, sequence=True, recompute="full", params="bf16")
    yield case(4, tensor=4, sequence=True, recompute="selective")
    yield case(8, tensor=2, pipeline=2, virtual_pipeline=2, context=2, sequence=True, recompute="full")
    yield case(1, "packed")
    yield case(1, "packed", recompute="full", params="bf16")
    yield case(2, "packed", tensor=2, sequence=True, recompute="full")
    yield case(2, "packed", pipeline=2, recompute="full")
    yield case(4, "packed", pipeline=2, virtual_pipeline=2)
    yield case(1, "kinds")
    yield case(1, "kinds", recompute="full", params="bf16")
    yield case(2, "kinds", pipeline=2, recompute="full")
    yield case(2, "kinds", tensor=2, sequence=True)
    yield case(2, "tied", pipeline=2, virtual_pipeline=2)
    yield case(2, "tied", tensor=2)


CASES = tuple(_cases())


def workspaces(folder: Path) -> dict[str, Path]:
    """Writes what the cases train on; recipes by `Case.recipe`."""
    recipes = {
        "restoration": make_workspace(folder / "restoration", "llama_3", SIZES, objectives=OBJECTIVES, **STEP),
        "tied": make_workspace(folder / "tied", "qwen3_tied", SIZES, objectives=OBJECTIVES, **STEP),
    }
    write_model("llama_3", folder / "packed" / "large", sizes=LARGE)
    changes: dict[str, Any] = {"objectives": PACKED, "teacher": {"hf": "large"}, **STEP}
    recipes["packed"] = make_workspace(folder / "packed", "llama_3", SIZES, **changes)
    make_workspace(folder / "kinds", "llama_3", SIZES, objectives=OBJECTIVES, **STEP)
    write_perturbed(folder / "kinds" / "model", folder / "kinds" / "other", seed=12)
    objectives = all_kinds(SIZES["num_hidden_layers"])
    objectives["own_relations"]["teacher"] = {"hf": "other"}
    return recipes | {"kinds": write_recipe(folder / "kinds", objectives=objectives)}


def measure(cases: Sequence[Case], recipes: Mapping[str, Path], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """{case: of each rank, its place and the parts at its peak}."""
    folder.mkdir(exist_ok=True)
    for world in sorted({case.world for case in cases}):
        run_ranks(_rank, world, [case for case in cases if case.world == world], recipes, folder)
    return {
        case.name: [json.loads((folder / f"{case.name}-{rank}.json").read_text()) for rank in range(case.world)]
        for case in cases
    }


def _rank(join: Callable[[str], None], cases: Sequence[Case], recipes: Mapping[str, Path], folder: Path) -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    for number, case in enumerate(cases):
        join(str(number))
        recipe = load_recipe(recipes[case.recipe], case.overrides)
        groups = initialize(recipe.parallel, seed=1)
        run = build_run(recipes[case.recipe], groups, *case.overrides)
        place = {"pipeline": groups.pp.rank(), "context": groups.cp.rank(), "data": groups.dp.rank()}
        rank = torch.distributed.get_rank()
        moments, sent, flops = _step(run)
        found = place | {"moments": moments, "sent": sent, "flops": flops}
        (folder / f"{case.name}-{rank}.json").write_text(json.dumps(found))
        destroy()


def _step(run: PhaseRun) -> tuple[dict[str, dict[str, int]], dict[str, int], int]:
    """{moment: {part: bytes}} and {axis: bytes sent} of the second step, since the first makes the optimizer's state;
    and the floating-point operations of its passes, made once more."""
    groups, step = run.groups, run.train_step
    live = LiveTensors()
    ask = step.teachers._ask

    def ask_and_mark(microbatch: Any, chunk: Any, targets: dict[Any, Any]) -> Any:
        output = ask(microbatch, chunk, targets)
        live.mark(targets.values(), "targets")
        return output

    step.teachers._ask = ask_and_mark  # type: ignore[method-assign]
    for number in (1, 2):
        set_hyperparameters(run.optimizer, run.phase.recipe.optimizer, number, 2)
        batches = run.data.step(number, groups.dp.rank(), groups.dp.size())
        if number == 1:
            step(batches)
    _mark_resident(live, run)
    inputs = [
        t for b in batches for t in (b.tokens, b.labels, b.student_positions, b.teacher_positions) if t is not None
    ]
    live.mark(inputs, "host")
    live.reset()
    axes = {"tensor": groups.tp, "context": groups.cp, "pipeline": groups.pp, "data": groups.dp_cp}
    messages = Messages({group.group_name: axis for axis, group in axes.items()})
    with live, messages:
        step.forward_backward(batches)
        moments = {"forward_backward": live.at_peak}
        live.reset()
        step.optimizer.step()
        moments["optimizer"] = live.at_peak
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        step.forward_backward(batches)
    return moments, messages.sent, counter.get_total_flops()


def _mark_resident(live: LiveTensors, run: PhaseRun) -> None:
    for teacher in run.train_step.teachers.models.values():
        live.mark((p for chunk in teacher for p in chunk.parameters()), "teacher")
    chained = getattr(run.optimizer, "chained_optimizers", [run.optimizer])
    states = [state for each in chained for state in each.optimizer.state.values()]
    live.mark((x for state in states for x in state.values() if isinstance(x, torch.Tensor)), "optimizer")
    live.mark((p for group in run.optimizer.param_groups for p in group["params"]), "optimizer")
    for wrapped in run.train_step.student:
        live.mark((p.data for p in wrapped.parameters()), "weights")
        for buffer in (*wrapped.buffers, *wrapped.expert_parallel_buffers):
            live.mark([buffer.grad_data], "gradients")
            if buffer.param_data is not None:
                live.mark([buffer.param_data], "weights")


@dataclass(frozen=True)
class Compared:
    """A stage of a case: bytes by part at the measured peak, and what was planned for the planned one."""

    case: str
    stage: int
    measured: Mapping[str, float]
    planned: Mapping[str, float]

    @property
    def error(self) -> float:
        """Of the total, relative to what was measured."""
        return sum(self.planned.values()) / sum(self.measured.values()) - 1

    def errors(self) -> dict[str, float]:
        """Of each part, relative to what was measured; targets and activations, which take turns, are one."""
        return {part: self.planned[part] / size - 1 for part, size in self.measured.items() if size}


def compare(cases: Sequence[Case], recipes: Mapping[str, Path], found: Mapping[str, Any]) -> Iterator[Compared]:
    """The fullest rank of every stage, of the last context ranks, which have the longest rows of attention."""
    for case in cases:
        [phase] = read_phases(load_recipe(recipes[case.recipe], case.overrides))
        last = phase.recipe.parallel.context - 1
        for stage in range(phase.recipe.parallel.pipeline):
            memory = StageMemory(phase, case.world, stage, PLAIN).memory()
            ranks = [r for r in found[case.name] if (r["pipeline"], r["context"]) == (stage, last)]
            moments = [_in_parts(parts) for rank in ranks for parts in rank["moments"].values()]
            measured = max(moments, key=lambda parts: sum(parts.values()))
            yield Compared(case.name, stage, measured, _in_parts(memory.peak.parts))


def compare_messages(
    cases: Sequence[Case], recipes: Mapping[str, Path], found: Mapping[str, Any]
) -> Iterator[tuple[str, str, int, float]]:
    """(case, axis, bytes that the busiest rank sent, planned). Without the context ring, which is the GPU's alone."""
    for case in cases:
        [phase] = read_phases(load_recipe(recipes[case.recipe], case.overrides))
        planned = plan_phase(phase, case.world, read_gpu("h100-80gb")).communication_bytes
        for axis in ("tensor", "pipeline", "data"):
            yield case.name, axis, max(rank["sent"].get(axis, 0) for rank in found[case.name]), planned[axis]


def compare_flops(
    cases: Sequence[Case], recipes: Mapping[str, Path], found: Mapping[str, Any]
) -> Iterator[tuple[str, int, float]]:
    """(case, floating-point operations of a step on all ranks, planned with what is computed twice)."""
    for case in cases:
        [phase] = read_phases(load_recipe(recipes[case.recipe], case.overrides))
        again = sum(each.microbatches * _flops_again(phase, name) for name, each in phase.recipe.objectives.items())
        yield case.name, sum(rank["flops"] for rank in found[case.name]), step_flops(phase) + again


def _flops_again(phase: Phase, name: str) -> float:
    """Of one micro-batch: what backward recomputes, and values inside attention, which are made a second time."""
    model, teacher, length = phase.source, phase.sites[name].teacher, phase.recipe.objectives[name].sequence_length
    per_token = {
        "none": 0.0,
        "selective": 2 * model.num_layers * model.layer_parameters(("mlp",)),
        "full": model.forward_flops_per_token(model.num_layers, length, False),
    }[phase.recipe.training.recompute]
    for _, output in {
        (tap.layer, tap.what == "attention_output") for tap in phase.needs[name].pairs if tap.what != "hidden"
    }:
        for each, passes in ((model, 3), (teacher, 1)):
            heads = each.num_attention_heads + 2 * each.num_kv_heads
            layer, products = (each.forward_flops_per_token(1, tokens, False) for tokens in (length, 0))
            attention = layer - products + 2 * each.layer_parameters(("attention",))
            per_token += passes * (attention if output else 2 * each.hidden_size * heads * each.head_dim)
    return phase.recipe.step.tokens_per_microbatch * per_token


def _in_parts(parts: Mapping[str, float]) -> dict[str, float]:
    resident = ("weights", "gradients", "optimizer", "teacher")
    rest = sum(size for part, size in parts.items() if part not in (*resident, "host"))
    return {part: parts.get(part, 0) for part in resident} | {"targets and activations": rest}


def markdown(compared: Iterable[Compared]) -> str:
    """The table of docs/planning.md."""
    parts = ("weights", "gradients", "optimizer", "teacher", "targets and activations")
    lines = ["| layout | stage | measured MiB | " + " | ".join(parts) + " | total |", "|" + " --- |" * (len(parts) + 4)]
    for each in compared:
        errors = each.errors()
        name = each.case.replace("parallel.", "").replace("training.", "").replace("precision.", "")
        cells = [f"{errors[part]:+.1%}" if part in errors else "" for part in parts]
        size = sum(each.measured.values()) / 2**20
        lines.append("| " + " | ".join([name, str(each.stage), f"{size:.1f}", *cells, f"{each.error:+.1%}"]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        written = workspaces(Path(temporary))
        found = measure(CASES, written, Path(temporary) / "out")
        print(markdown(compare(CASES, written, found)))
        print("\n| layout | axis | sent, KiB | planned less sent, bytes |\n" + "|" + " --- |" * 4)
        for name, axis, sent, planned in compare_messages(CASES, written, found):
            if sent or planned:
                print(f"| {name} | {axis} | {sent / 1024:.0f} | {planned - sent:+,.0f} |")
        print("\n| layout | GFLOPs | planned |\n" + "|" + " --- |" * 3)
        for name, counted, planned in compare_flops(CASES, written, found):
            print(f"| {name} | {counted / 1e9:.2f} | {planned / counted - 1:+.2%} |")
