"""Which layers to distil: those whose attention the longer window's RoPE moves most, before any training.

LongReD (arXiv 2502.07365): the M layers with the largest drift, the last one among them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longred_megatron.analysis.measure import Drift, Ranks, Subject, measure_drift, study_device
from longred_megatron.analysis.network import Network
from longred_megatron.data.sequences import IndexedSequences, SequenceSource, check_tokens
from longred_megatron.errors import UserError, listed
from longred_megatron.evaluation.models import resolve_dtype
from longred_megatron.files import write_text
from longred_megatron.recipe import Phase
from longred_megatron.rope import RopeMethod
from longred_megatron.settings import Mark, marked_fields
from longred_megatron.training.microbatches import stable_hash

NUM_TEXTS = 16  # ours: not published
LONGEST_TEXT = 8192  # tokens; what LongReD measures drift on
DRIFT = "drift.json"


@dataclass(frozen=True)
class LayerDrift:
    """What the recipe's RoPE alone does to each layer. ranking: layers by falling drift."""

    drift: Drift
    tokens: Tensor  # [texts, length]
    sweep: dict[str, Drift]  # of other RoPE changes, by their settings

    @property
    def ranking(self) -> list[int]:
        return [k + 1 for k in torch.argsort(self.drift.layers, descending=True, stable=True).tolist()]

    def chosen(self, count: int) -> list[int]:
        """`count` layers by falling drift, the last layer at the end, which counts."""
        last = len(self.drift.layers)
        return [*[layer for layer in self.ranking if layer != last][: count - 1], last]

    def write(self, output: Path, count: int) -> None:
        """Writes drift.json."""
        measured = self.drift.to_json()
        content = {"layers": measured["layers"], "heads": measured["heads"]}
        content |= {"ranking": self.ranking, "chosen": self.chosen(count)}
        write_text(output / DRIFT, json.dumps(content, indent=1, allow_nan=False) + "\n")


def layer_drift(
    phase: Phase,
    num_texts: int = NUM_TEXTS,
    length: int | None = None,
    others: Sequence[RopeMethod] = (),
    ranks: Ranks | None = None,
) -> LayerDrift:
    """Measures model.hf with the phase's RoPE against itself as released.

    Args:
        length: tokens of a text; None: the original window, at most `LONGEST_TEXT`.
        others: more RoPE changes to measure beside it.

    Raises:
        UserError: the recipe's RoPE changes nothing, a RoPE does not fit the model, or there are too few texts.
    """
    ranks, hf = ranks or Ranks(), phase.recipe.model.hf
    methods = [phase.recipe.model.rope, *others]
    ropes = [_extended(phase, method) for method in methods]
    if ropes[0][0] == phase.source.rope:
        raise UserError(
            "`model.rope` is none: RoPE stays as it is, so that no layer's attention drifts; name the layers in the "
            "recipe, or choose a method"
        )
    tokens = _texts(phase, num_texts, length or min(phase.source.max_position_embeddings, LONGEST_TEXT))
    device = study_device()
    network = Network(hf, resolve_dtype("auto", device), device)
    subjects = [Subject(network, network.rotary(*rope)) for rope in ropes]
    with ranks.bar(network.architecture.num_layers, tokens, "attention drift") as bar:
        drift, *sweep = measure_drift(tokens, Subject(network), subjects, ranks, bar)
    if not drift.heads.any():
        raise UserError(
            f"`model.rope` {rope_name(methods[0])}: changes nothing on texts of {tokens.shape[1]} tokens, so that no "
            "layer's attention drifts; name the layers in the recipe"
        )
    return LayerDrift(drift, tokens, dict(zip(map(rope_name, others), sweep, strict=True)))


def rope_name(method: RopeMethod) -> str:
    """A method with its settings, as a person writes it."""
    settings = method.model_dump(mode="json", exclude={"method"}, exclude_defaults=True)
    return " ".join(
        [method.method, *(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in settings.items())]
    )


def _extended(phase: Phase, method: RopeMethod) -> tuple[dict[str, Any], int]:
    """`rope_parameters` and window (tokens) of the model with another RoPE."""
    source = phase.rope_source
    if problems := list(method.problems("rope", source)):
        raise UserError(*problems)
    return method.extended(source), method.max_position_embeddings(source)


def distilled_data(phase: Phase) -> str:
    """The data set whose texts are measured: that of the first objective that names layers; without one, the first."""
    objectives = phase.recipe.objectives.values()
    with_layers = [each for each in objectives if marked_fields(type(each), Mark.LAYERS)]
    return (with_layers or list(objectives))[0].data


def _texts(phase: Phase, num_texts: int, length: int) -> Tensor:
    """[num_texts, length] tokens."""
    if length > (window := phase.source.max_position_embeddings):
        raise UserError(
            f"--length {length}: longer than the window of {window} tokens of model.hf, past which its attention is no "
            f"guide; use {window} or less"
        )
    recipe, name = phase.recipe, distilled_data(phase)
    if name not in recipe.data:
        raise UserError(f"the recipe's `data` has no set {name!r}, which its objectives name; add it")
    for prefix in recipe.data[name]:
        check_tokens(prefix, phase.source.vocab_size)
    seed = stable_hash(recipe.training.seed, "layers")
    source = SequenceSource(IndexedSequences, recipe.data[name], length - 1, seed)
    tokens = torch.stack([torch.from_numpy(source[i]) for i in range(num_texts)])
    if (different := len(torch.unique(tokens, dim=0))) < num_texts:
        sets = listed(recipe.data[name])
        raise UserError(
            f"`data.{name}` has only {different} different texts of {length} tokens ({sets}), {num_texts} are asked "
            f"for; use --texts {different}, a smaller --length, or more text"
        )
    return tokens
