"""A small copy of a recipe: the same layout, objectives, layers and depth, tiny widths, random texts and weights."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from transformers import AutoConfig, AutoModelForCausalLM

from longred_megatron.families import Architecture
from longred_megatron.recipe import Phase, Recipe
from longred_megatron.settings import Mark, convert_marked

VOCABULARY = 256
DRIFT = 0.3  # of a weight's own size: how far the student is from a teacher of its sizes


@dataclass(frozen=True)
class Sizes:
    """What the copy's models and texts measure.

    head_dim: of attention. shortest_sequence: in tokens; lengths are divided until one would be shorter.
    multiple: every width of a tensor rank is a multiple of it.
    """

    head_dim: int
    shortest_sequence: int
    multiple: int = 1


def small_copy(recipe: Recipe, phases: Sequence[Phase], folder: Path, sizes: Sizes) -> tuple[dict[str, Any], list[str]]:
    """Writes small models and random texts to `folder`: the same bytes at every call.

    Kept: objectives, micro-batches, weights, layers, depth, layout, recompute, the ratio of attention heads to
    key/value heads, which lengths are multiples of which. Of models only config.json is read. A student of its
    teacher's sizes has weights near the teacher's, and not the same: of equal hidden states a loss is noise.

    Returns:
        The values of a recipe that trains the copy, and what was changed, each a line.
    """
    tensor, source = recipe.parallel.tensor, phases[0].source
    factor = min(_length_factor(phase, sizes.shortest_sequence) for phase in phases)  # powers of two
    teachers = {hf: teacher for phase in phases for hf, teacher in phase.teachers.items()}
    # One width for models of one width, which transformers takes for the heads of each.
    heads = (_num_heads(architecture, tensor) for architecture in (source, *teachers.values()))
    multiple = math.lcm(sizes.multiple, *heads)
    hidden = _hidden_size(source, multiple)
    student = write_model(recipe.model.hf, source, hidden, tensor, factor, sizes, folder / "student", DRIFT)
    small = {str(recipe.model.hf): student}
    for i, (hf, each) in enumerate(teachers.items()):
        own = _hidden_size(each, multiple)
        small[str(hf)] = write_model(hf, each, own, tensor, factor, sizes, folder / f"teacher-{i}")
    longest = max(settings.sequence_length for phase in phases for settings in phase.recipe.objectives.values())
    for i in range(max(len(blend) for phase in phases for blend in phase.recipe.data.values())):
        write_texts(folder / f"texts-{i}", longest // factor, VOCABULARY)
    values = _shrunk(recipe.model_dump(mode="json"), small, factor, sizes.head_dim, folder)
    values["model"]["hf"] = str(student)
    if values["phases"]:
        values["phases"] = [_shrunk(change, small, factor, sizes.head_dim, folder) for change in values["phases"]]
    values["run"]["dir"] = str(folder / "run")
    return values, [
        f"all lengths and windows: divided by {factor}",
        f"widths: hidden {source.hidden_size} -> {hidden}, heads of {sizes.head_dim}, random weights",
    ]


def without_fp8(values: dict[str, Any]) -> None:
    """Leaves the parameters' format of a recipe's values, and of its phases' changes, and no FP8."""
    for each in (values, *(values["phases"] or ())):
        if "precision" in each:
            each["precision"] = {key: value for key, value in each["precision"].items() if key == "params"}


def without_gpu(values: dict[str, Any]) -> None:
    """Leaves out of a recipe's values, and of its phases' changes, what needs a GPU."""
    without_fp8(values)
    values["parallel"]["tp_comm_overlap"] = False


def _shrunk(
    values: dict[str, Any], models: dict[str, Path], factor: int, head_dim: int, folder: Path
) -> dict[str, Any]:
    """A recipe's values, or a phase's changes, with the small models and texts of `folder`, lengths divided."""
    changes: dict[Mark, Callable[[Any], Any]] = {
        Mark.PATH: lambda path: path and str(models.get(path, path)),
        Mark.OUTPUT: lambda path: path and str(folder / "outputs" / Path(path).name),
        Mark.TOKENS: lambda length: length and max(1, length // factor),
        Mark.ENTRIES: lambda entries: entries and min(entries, VOCABULARY // 2),
    }
    for mark, change in changes.items():
        values = convert_marked(values, Recipe, mark, change)
    if isinstance(rope := values.get("model", {}).get("rope"), dict):
        values["model"]["rope"] = _of_small_heads(rope, head_dim)
    for name, blend in values.get("data", {}).items():
        values["data"][name] = blend and {str(folder / f"texts-{i}"): w for i, w in enumerate(blend.values())}
    if "warmup_steps" in values.get("optimizer", {}):
        values["optimizer"]["warmup_steps"] = min(values["optimizer"]["warmup_steps"], 1)
    return values


def _length_factor(phase: Phase, shortest_sequence: int) -> int:
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
        return whole and cut and split and min(lengths) // factor >= shortest_sequence

    factor = 1
    while fits(2 * factor):
        factor *= 2
    return factor


def _num_heads(architecture: Architecture, tensor: int) -> int:
    """One key/value head a tensor rank, and as many queries for each as the real model has."""
    return tensor * (architecture.num_attention_heads // architecture.num_kv_heads)


def _hidden_size(architecture: Architecture, multiple: int) -> int:
    return multiple * -(-max(32, architecture.hidden_size // 64) // multiple)


def write_model(
    hf: Path,
    architecture: Architecture,
    hidden: int,
    tensor: int,
    factor: int,
    sizes: Sizes,
    folder: Path,
    drift: float = 0.0,
) -> Path:
    """A random model of the same family, depth and proportions, cut by `tensor` as the real one is.

    drift: how far its weights are from those of a model that was written without, in parts of their size.
    """
    config = AutoConfig.from_pretrained(hf, local_files_only=True, trust_remote_code=False)
    step = tensor * sizes.multiple
    settings = config.to_dict() | {
        "hidden_size": hidden,
        "head_dim": sizes.head_dim,
        "num_key_value_heads": tensor,
        "num_attention_heads": _num_heads(architecture, tensor),
        "intermediate_size": step * -(-hidden * architecture.intermediate_size // architecture.hidden_size // step),
        "vocab_size": VOCABULARY + architecture.vocab_size % tensor,
        "max_position_embeddings": architecture.max_position_embeddings // factor,
        "rope_parameters": _divided(_of_small_heads(architecture.rope, sizes.head_dim), factor),
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        "dtype": "float32",
    }
    model = AutoModelForCausalLM.from_config(type(config)(**settings), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for share in (1.0, drift):
        for parameter in model.parameters():
            _randomize(parameter.data, share, generator)
    model.save_pretrained(folder)
    return folder


def _randomize(weight: torch.Tensor, share: float, generator: torch.Generator) -> None:
    """Adds random numbers, which a share of 1 makes so large that every layer changes the hidden state: transformers'
    own are so small at tiny widths that a missing position or a wrong mask would hardly show."""
    noise = torch.empty_like(weight).normal_(generator=generator)
    if weight.dim() == 1:  # norms begin at one, biases at zero
        weight += 0.1 * share * noise
    elif share == 1:
        weight.copy_(noise / math.sqrt(weight.shape[1]))
    else:
        weight += share / math.sqrt(weight.shape[1]) * noise


def _divided(rope: dict[str, Any], factor: int) -> dict[str, Any]:
    key = "original_max_position_embeddings"
    return rope | ({key: max(1, rope[key] // factor)} if key in rope else {})


def _of_small_heads(rope: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """A RoPE, of a model or a recipe, for heads of `head_dim`: its lists have a number for each pair of dims."""
    pairs = range(head_dim // 2)
    return {k: [v[i * len(v) // len(pairs)] for i in pairs] if isinstance(v, list) else v for k, v in rope.items()}


def write_texts(prefix: Path, longest: int, vocabulary: int) -> None:
    """Random tokens: eight documents of half of `longest` to all of it."""
    generator, dtype = np.random.default_rng(0), np.uint16 if vocabulary <= 2**16 else np.int32
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for length in generator.integers(longest // 2, longest + 1, size=8):
        builder.add_document(generator.integers(0, vocabulary, size=length), [int(length)])
    builder.finalize(f"{prefix}.idx")
