"""A cluster's recipe on a CPU: the same layout, objectives, layers and code path, tiny widths, random texts.

It trains two steps, starts again from their checkpoint for a third, and exports; in phases, one step of each, and those
three of the last. What is wrong with a recipe, a layout or the project on it shows here, and not after a night in the
queue.
"""

import json
import logging
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from longred_megatron.errors import UserError
from longred_megatron.families import Architecture
from longred_megatron.parallel.groups import destroy, initialize
from longred_megatron.parallel.local_ranks import run_ranks
from longred_megatron.recipe import Phase, Recipe, check_phases, dump_recipe, load_recipe, phases_summary, read_phases
from longred_megatron.settings import Mark, convert_marked
from longred_megatron.training.metrics import memory
from longred_megatron.training.microbatches import open_data
from longred_megatron.training.run import PhaseRun, train

MAX_RANKS = 16
RANKS_WITH_TWO_REPLICAS = 8  # at most; larger worlds are rehearsed with one
STEPS, STEPS_AFTER_RESUME = 2, 3
SHORTEST_SEQUENCE = 8  # tokens
HEAD_DIM = 8
VOCABULARY = 256


@dataclass(frozen=True)
class Rehearsal:
    """A small copy of a recipe, and what was changed to make it."""

    recipe: Recipe
    num_ranks: int
    changes: list[str]


def rehearse(recipe: Recipe) -> None:
    """Rehearses `recipe` in a temporary folder and prints what each rank did. Of model.hf (and teacher.hf) only
    config.json is read; data sets are replaced by random tokens.

    Raises:
        UserError: the recipe cannot run in its layout, or a rank failed.
    """
    started = time.perf_counter()
    disable_progress_bar()  # transformers', for models of no size
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as temporary:
        folder = Path(temporary)
        rehearsal = shrink(recipe, folder)
        print("rehearsal on random texts; changed for it:")
        print("".join(f"  {change}\n" for change in rehearsal.changes))
        small = rehearsal.recipe
        phases = read_phases(small)
        print(phases_summary(phases, rehearsal.num_ranks), flush=True)
        path = folder / "recipe.yaml"
        path.write_text(dump_recipe(small), encoding="utf-8")
        try:
            run_ranks(_rank, rehearsal.num_ranks, path, folder)
        except ProcessExitedException as error:
            raise UserError(f"the rehearsal failed: {error}; is there enough memory?") from None
        except ProcessRaisedException as error:
            _, is_users, problems = str(error).partition(f"{UserError.__module__}.{UserError.__qualname__}: ")
            if not is_users:
                raise
            raise UserError(*problems.strip().splitlines()) from None
        model = AutoModelForCausalLM.from_pretrained(small.run.dir / "hf")
        logits = model(torch.zeros(1, 4, dtype=torch.int64)).logits
        if not logits.isfinite().all():
            raise UserError("the exported model's logits are not finite")
        print(_report(folder, rehearsal.num_ranks))
    steps, seconds = phases[-1].steps_before + STEPS, time.perf_counter() - started
    print(
        f"rehearsed in {seconds:.0f} seconds: {steps} steps, a restart from their checkpoint, one more step, and an "
        "export that transformers loads. Not rehearsed: GPU kernels, memory, speed, your texts."
    )


def shrink(recipe: Recipe, folder: Path) -> Rehearsal:
    """Writes a small model, a small teacher and random texts to `folder`, and a recipe that trains them.

    Kept: objectives, micro-batches, weights, layers, depth, pipeline and virtual pipeline, recompute, the ratio of
    attention heads to key/value heads, which lengths are multiples of which.
    """
    parallel, changes = recipe.parallel, []
    while parallel.tensor * parallel.pipeline * parallel.context > MAX_RANKS:
        name = "tensor" if parallel.tensor > 2 else "context"
        size = getattr(parallel, name)
        if size <= 2:
            raise UserError(
                f"`parallel.pipeline` is {parallel.pipeline}: a rehearsal takes {MAX_RANKS} ranks; try it with a "
                f"smaller one (parallel.pipeline={MAX_RANKS // (parallel.tensor * parallel.context)} --rehearse)"
            )
        parallel = parallel.model_copy(update={name: size // 2})
        changes.append(f"parallel.{name}: {size} -> {size // 2}, to fit on {MAX_RANKS} ranks")
    ranks = parallel.tensor * parallel.pipeline * parallel.context
    replicas = 2 if 2 * ranks <= RANKS_WITH_TWO_REPLICAS else 1
    resized = recipe.model_copy(update={"parallel": parallel})
    phases = read_phases(resized)
    problems = check_phases(phases, ranks * replicas, gpu=True)
    if replicas == 2 and problems:  # the step's micro-batches may suit one replica only
        replicas = 1
        problems = check_phases(phases, ranks, gpu=True)
    if problems:
        raise UserError(*problems)
    changes.append(f"data-parallel replicas: {replicas}; {ranks * replicas} ranks, a process each")

    factor = min(_length_factor(phase) for phase in phases)  # powers of two
    changes.append(f"all lengths and windows: divided by {factor}")
    source = phases[0].source
    models = {recipe.model.hf: source}
    for phase in phases:
        models |= phase.teachers
    # One width for models of one width, which transformers takes for the heads of each.
    multiple = math.lcm(*(_num_heads(architecture, parallel.tensor) for architecture in models.values()))
    small = {
        str(hf): _write_model(hf, each, _hidden_size(each, multiple), parallel.tensor, factor, folder / f"model-{i}")
        for i, (hf, each) in enumerate(models.items())
    }
    width = f"{source.hidden_size} -> {_hidden_size(source, multiple)}"
    changes.append(f"widths: hidden {width}, heads of {HEAD_DIM}, random weights")
    longest = max(settings.sequence_length for phase in phases for settings in phase.recipe.objectives.values())
    for i in range(max(len(blend) for phase in phases for blend in phase.recipe.data.values())):
        _write_texts(folder / f"texts-{i}", longest // factor)
    values = _shrunk(resized.model_dump(mode="json"), small, factor, folder)
    if values["phases"]:
        values["phases"] = [_shrunk(change, small, factor, folder) for change in values["phases"]]
        for change in values["phases"][:-1]:
            change["training"] = change.get("training", {}) | {"steps": 1}
    changes += _fp8_changes(phases)
    values["training"] |= {"steps": STEPS_AFTER_RESUME, "checkpoint_every_steps": 1, "keep_checkpoints": 1}
    values["debug"]["dump_microbatches"] = None
    values["run"]["dir"] = str(folder / "run")
    return Rehearsal(Recipe.model_validate(values), ranks * replicas, changes)


def _fp8_changes(phases: Sequence[Phase]) -> list[str]:
    kinds = dict.fromkeys(phase.recipe.precision.fp8 for phase in phases if phase.recipe.precision.fp8)
    return [f"precision.fp8: {kind} -> null, there is no GPU; its settings were checked" for kind in kinds]


def _shrunk(values: dict[str, Any], models: dict[str, Path], factor: int, folder: Path) -> dict[str, Any]:
    """A recipe's values, or a phase's changes, with the small models and texts of `folder`, lengths divided."""
    changes: dict[Mark, Callable[[Any], Any]] = {
        Mark.PATH: lambda path: str(models.get(path, path)),
        Mark.TOKENS: lambda length: length and max(1, length // factor),
        Mark.ENTRIES: lambda entries: entries and min(entries, VOCABULARY // 2),
    }
    for mark, change in changes.items():
        values = convert_marked(values, Recipe, mark, change)
    if isinstance(rope := values.get("model", {}).get("rope"), dict):
        values["model"]["rope"] = _of_small_heads(rope)
    for name, blend in values.get("data", {}).items():
        values["data"][name] = blend and {str(folder / f"texts-{i}"): w for i, w in enumerate(blend.values())}
    if "precision" in values:  # without FP8
        values["precision"] = {key: value for key, value in values["precision"].items() if key == "params"}
    if "warmup_steps" in values.get("optimizer", {}):
        values["optimizer"]["warmup_steps"] = min(values["optimizer"]["warmup_steps"], 1)
    return values


def _length_factor(phase: Phase) -> int:
    """The largest power of two by which every length can be divided."""
    recipe, parallel = phase.recipe, phase.recipe.parallel
    lengths = [settings.sequence_length for settings in recipe.objectives.values()]
    windows = [recipe.model.max_position_embeddings, phase.source.max_position_embeddings]
    windows += [teacher.max_position_embeddings for teacher in phase.teachers.values()]
    tokens = recipe.step.tokens_per_microbatch

    def fits(factor: int) -> bool:
        whole = all(length % factor == 0 for length in (*lengths, *windows, tokens))
        cut = all(
            settings.whole_sequences or settings.sequence_length // factor % (2 * parallel.context) == 0
            for settings in recipe.objectives.values()
        )
        split = tokens // factor % (parallel.context * parallel.tensor) == 0
        return whole and cut and split and min(lengths) // factor >= SHORTEST_SEQUENCE

    factor = 1
    while fits(2 * factor):
        factor *= 2
    return factor


def _num_heads(architecture: Architecture, tensor: int) -> int:
    """One key/value head a tensor rank, and as many queries for each as the real model has."""
    return tensor * (architecture.num_attention_heads // architecture.num_kv_heads)


def _hidden_size(architecture: Architecture, multiple: int) -> int:
    return multiple * -(-max(32, architecture.hidden_size // 64) // multiple)


def _write_model(hf: Path, architecture: Architecture, hidden: int, tensor: int, factor: int, folder: Path) -> Path:
    """A random model of the same family, depth and proportions, cut by `tensor` as the real one is."""
    config = AutoConfig.from_pretrained(hf, local_files_only=True, trust_remote_code=False)
    settings = config.to_dict() | {
        "hidden_size": hidden,
        "head_dim": HEAD_DIM,
        "num_key_value_heads": tensor,
        "num_attention_heads": _num_heads(architecture, tensor),
        "intermediate_size": tensor * -(-hidden * architecture.intermediate_size // architecture.hidden_size // tensor),
        "vocab_size": VOCABULARY + architecture.vocab_size % tensor,
        "max_position_embeddings": architecture.max_position_embeddings // factor,
        "rope_parameters": _divided(_of_small_heads(architecture.rope), factor),
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        "dtype": "float32",
    }
    model = AutoModelForCausalLM.from_config(type(config)(**settings), dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def _divided(rope: dict[str, Any], factor: int) -> dict[str, Any]:
    key = "original_max_position_embeddings"
    return rope | ({key: max(1, rope[key] // factor)} if key in rope else {})


def _of_small_heads(rope: dict[str, Any]) -> dict[str, Any]:
    """A RoPE, of a model or a recipe, for heads of HEAD_DIM: its lists have a number for each pair of dims."""
    pairs = range(HEAD_DIM // 2)
    return {k: [v[i * len(v) // len(pairs)] for i in pairs] if isinstance(v, list) else v for k, v in rope.items()}


def _write_texts(prefix: Path, longest: int) -> None:
    """Random tokens: eight documents of half of `longest` to all of it."""
    generator = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for length in generator.integers(longest // 2, longest + 1, size=8):
        builder.add_document(generator.integers(0, VOCABULARY, size=length), [int(length)])
    builder.finalize(f"{prefix}.idx")


def _rank(join: Callable[[str], None], path: Path, folder: Path) -> None:
    """What each rank runs: both parts of the run; then it writes down what it held."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    num_phases = len(load_recipe(path).phases or ())
    key = f"phases.{num_phases - 1}.training.steps" if num_phases else "training.steps"
    for steps in (STEPS, STEPS_AFTER_RESUME):
        join(f"world-{steps}")
        recipe = load_recipe(path, [f"{key}={steps}"])
        phases, groups = read_phases(recipe), initialize(recipe.parallel, recipe.training.seed)
        run = train(recipe, phases, open_data(phases), groups)
        rank = torch.distributed.get_rank()
        (folder / f"rank-{rank}.json").write_text(json.dumps(_description(run)), encoding="utf-8")
        destroy()


def _description(run: PhaseRun) -> dict[str, str]:
    """This rank's place and part, as a row of the report."""
    groups, phase = run.groups, run.phase
    place = {name: getattr(groups, name).rank() for name in ("tp", "pp", "cp", "dp")}
    ends = [name for name in ("pre_process", "post_process") if any(getattr(chunk, name) for chunk in run.chunks)]
    held = {number for chunk in run.chunks for number in chunk.layer_numbers()}
    compared = {tap.layer for needs in phase.needs.values() for tap in needs.pairs}
    if any(needs.teacher_head for needs in phase.needs.values()):
        compared.add(phase.source.num_layers)
    parts = {"pre_process": "embedding", "post_process": "head"}
    teachers = [_spans(chunk.layer_numbers()) for chunks in run.train_step.teachers.values() for chunk in chunks]
    return {
        **{name: str(rank) for name, rank in place.items()},
        "layers": ", ".join([*(_spans(chunk.layer_numbers()) for chunk in run.chunks), *(parts[end] for end in ends)]),
        "teacher layers": ", ".join(teachers) or "none",
        "compares": ", ".join(map(str, sorted(held & compared))) or "none",
        "parameters": f"{sum(p.numel() for chunk in run.chunks for p in chunk.parameters()):,}",
        "peak memory": f"{memory()['memory/peak_resident_bytes'] / 2**20:,.0f} MiB",
    }


def _spans(numbers: range) -> str:
    return f"{numbers[0]}-{numbers[-1]}" if numbers else "none"


def _report(folder: Path, num_ranks: int) -> str:
    rows = [json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(num_ranks)]
    table = [["rank", *rows[0]], *([str(rank), *row.values()] for rank, row in enumerate(rows))]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    )
