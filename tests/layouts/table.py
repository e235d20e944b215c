"""The layouts that are compared with one process. `make layouts` prints the table:

python -m tests.layouts.table
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.checkpoint.small_models import write_model
from tests.layouts.ranks import Case, Outcome, run_all
from tests.objectives.examples import all_kinds
from tests.training.workspace import make_workspace, write_perturbed, write_recipe

SIZES: dict[str, Any] = {
    "num_hidden_layers": 8,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "intermediate_size": 96,
}
# Recipes: what is trained. Adam's epsilon is so large that an update is proportional to the gradient, and the rate such
# that it moves the weights: so an error in any gradient shows in the weights.
CHANGES: dict[str, Any] = {
    "objectives": {
        "long_text": {"microbatches": 4, "sequence_length": 256, "data": "texts"},
        "short_restoration": {
            "microbatches": 2,
            "sequence_length": 16,
            "data": "texts",
            "layers": [1, 3, 6, 8],
            "weight": 5,
        },
    },
    "optimizer": {"lr": 0.5, "eps": 1.0},
}
MODELS = {"untied": "llama_3", "tied": "qwen3_tied", "biases": "qwen2"}
# Logit distillation from a teacher of another width, depth, and padding of the vocabulary; and beside the other three
# objectives, from a teacher like the student.
LARGE: dict[str, Any] = {
    "num_hidden_layers": 6,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "vocab_size": 110,
}
PACKED = {"microbatches": 4, "sequence_length": 128, "data": "texts"}
MASKED = {"mask_documents": True, "restart_positions": True, "top_k": 5, "temperature": 2.0}
ALONE = {"long_text": None, "short_to_long": None, "short_restoration": None}
PACKED_RECIPES: dict[str, dict[str, Any]] = {
    "packed": {"objectives": ALONE | {"packed_distillation": PACKED | {"cross_entropy": 0.1}}},
    "masked": {"objectives": ALONE | {"packed_distillation": PACKED | MASKED}},
    "mixed": {"objectives": {"packed_distillation": PACKED | {"sequence_length": 64, "direction": "reverse"}}},
}
STEPS = {"kinds": 1}  # a step has five times as many micro-batches as the others
WHOLE = ("objectives.short_to_long.whole_sequences=true", "objectives.short_restoration.whole_sequences=true")
WHOLE_PACKS = ("objectives.packed_distillation.whole_sequences=true",)
FEW_LAYERS = ("objectives.short_to_long=null", "objectives.short_restoration.layers=[1, 2]")


@dataclass(frozen=True)
class Layout:
    """A row of the table.

    whole_sequences: the short objectives' or the packs are not cut over the context ranks. few_layers: only the lowest
    are taught.
    """

    world: int
    parallel: Mapping[str, Any]
    model: str = "untied"
    recompute: str = "none"
    whole_sequences: bool = False
    few_layers: bool = False
    params: str = "fp32"
    sabotage: str | None = None

    @property
    def overrides(self) -> tuple[str, ...]:
        """Of the recipe, as on the command line."""
        parallel = tuple(f"parallel.{key}={value}" for key, value in self.parallel.items())
        whole = WHOLE_PACKS if self.model in PACKED_RECIPES else WHOLE
        chosen = (whole if self.whole_sequences else ()) + (FEW_LAYERS if self.few_layers else ())
        return (*parallel, f"training.recompute={self.recompute}", f"precision.params={self.params}", *chosen)

    @property
    def reference(self) -> "Layout":
        """One process on the same objectives."""
        return Layout(1, {}, self.model, few_layers=self.few_layers, params=self.params)

    @property
    def name(self) -> str:
        parallel = [f"{key}{value}".replace(" ", "") for key, value in self.parallel.items()]
        flags = (self.whole_sequences and "whole", self.few_layers and "few", self.sabotage)
        chosen = (self.recompute, self.params, *(flag for flag in flags if flag))
        return "-".join([str(self.world), self.model, *parallel, *chosen])


def _layouts() -> Iterator[Layout]:
    # Each axis alone.
    yield Layout(2, {})
    yield Layout(2, {"tensor": 2})
    yield Layout(2, {"tensor": 2, "sequence": True})
    yield Layout(2, {"pipeline": 2})
    yield Layout(2, {"pipeline": 2, "virtual_pipeline": 2})
    yield Layout(2, {"pipeline": 2, "layers_per_chunk": [3, 5]})
    yield Layout(2, {"context": 2})
    yield Layout(2, {"context": 2}, whole_sequences=True)
    yield Layout(1, {}, recompute="full")
    yield Layout(1, {}, recompute="selective")
    yield Layout(2, {"overlap_param_gather": True})
    # The other models, where they differ.
    yield Layout(2, {"tensor": 2, "sequence": True}, model="tied")
    yield Layout(2, {"pipeline": 2}, model="tied")
    yield Layout(2, {"pipeline": 2, "virtual_pipeline": 2}, model="tied", recompute="full")
    yield Layout(2, {"tensor": 2}, model="biases")
    yield Layout(2, {"pipeline": 2}, few_layers=True)
    yield Layout(2, {"pipeline": 2, "virtual_pipeline": 4}, few_layers=True)
    # Two axes.
    yield Layout(4, {"tensor": 2, "pipeline": 2})
    yield Layout(4, {"tensor": 2, "context": 2, "sequence": True}, recompute="full")
    yield Layout(4, {"pipeline": 2, "context": 2}, whole_sequences=True, recompute="full")
    yield Layout(4, {"pipeline": 2, "virtual_pipeline": 2, "context": 2}, recompute="selective")
    yield Layout(4, {"pipeline": 4, "layers_per_chunk": [1, 3, 3, 1]})
    yield Layout(4, {"pipeline": 4, "virtual_pipeline": 2})
    yield Layout(
        4, {"pipeline": 2, "virtual_pipeline": 2, "overlap_param_gather": True}, model="tied", recompute="full"
    )
    yield Layout(4, {"context": 4})
    yield Layout(4, {"pipeline": 2, "virtual_pipeline": 2, "layers_per_chunk": [1, 3, 2, 2]}, model="tied")
    yield Layout(4, {"context": 2}, model="biases", whole_sequences=True)
    # Three and more.
    yield Layout(8, {"tensor": 2, "pipeline": 2, "context": 2, "sequence": True}, recompute="full")
    yield Layout(8, {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "context": 2}, whole_sequences=True)
    yield Layout(8, {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "sequence": True}, "tied", "full")
    yield Layout(8, {"pipeline": 4, "virtual_pipeline": 2, "context": 2}, "tied", "selective", True)
    yield Layout(8, {"tensor": 4, "context": 2, "sequence": True}, model="biases")
    # Logit distillation.
    yield Layout(2, {"tensor": 2}, model="packed")
    yield Layout(2, {"pipeline": 2}, model="packed")
    yield Layout(2, {"pipeline": 2, "virtual_pipeline": 2}, model="packed", recompute="full")
    yield Layout(2, {"context": 2}, model="packed")
    yield Layout(2, {"context": 2}, model="masked", whole_sequences=True)
    yield Layout(2, {"context": 2}, model="masked")
    yield Layout(4, {"context": 4}, model="masked")
    yield Layout(4, {"tensor": 2, "context": 2, "sequence": True}, model="masked", recompute="full")
    yield Layout(4, {"tensor": 2, "pipeline": 2, "sequence": True}, model="masked", recompute="full")
    yield Layout(4, {"pipeline": 2, "virtual_pipeline": 2}, model="mixed")
    yield Layout(8, {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "context": 2, "sequence": True}, "packed")
    yield Layout(8, {"tensor": 2, "pipeline": 2, "context": 2}, model="mixed", recompute="full")
    # Every kind of objective there is, in one step; one of them with a teacher of its own.
    yield Layout(2, {}, model="kinds")
    yield Layout(1, {}, model="kinds", recompute="full")
    yield Layout(2, {"tensor": 2}, model="kinds")
    yield Layout(2, {"tensor": 2, "sequence": True}, model="kinds", recompute="selective")
    yield Layout(2, {"pipeline": 2}, model="kinds", recompute="full")
    yield Layout(2, {"pipeline": 2, "virtual_pipeline": 2}, model="kinds")
    yield Layout(2, {"context": 2}, model="kinds")
    yield Layout(2, {"context": 2, "overlap_param_gather": True}, model="kinds")
    yield Layout(8, {"tensor": 2, "pipeline": 2, "context": 2, "sequence": True}, model="kinds", recompute="full")


LAYOUTS = tuple(_layouts())
# In bf16 sums are rounded in another order, so these agree to its 8 bits only.
BF16_LAYOUTS = (
    Layout(4, {"tensor": 2, "pipeline": 2, "sequence": True}, params="bf16", recompute="full"),
    Layout(4, {"pipeline": 2, "virtual_pipeline": 2, "context": 2}, params="bf16"),
)
# A fault of `sabotage.py` each, in a layout where it matters.
FAULTS = (
    Layout(2, {"context": 2}, sabotage="positions_not_cut"),
    Layout(2, {"pipeline": 2}, sabotage="weight_of_another_microbatch"),
    Layout(2, {"tensor": 2}, sabotage="loss_counted_per_tensor_rank"),
    Layout(2, {"context": 2}, sabotage="gradient_of_context_ranks_lost"),
    Layout(2, {"pipeline": 2, "virtual_pipeline": 2}, sabotage="neighbours_swapped"),
    Layout(2, {"tensor": 2}, model="kinds", sabotage="term_counted_per_tensor_rank"),
    Layout(2, {"pipeline": 2}, model="kinds", recompute="full", sabotage="tap_of_another_microbatch"),
    Layout(2, {"pipeline": 2}, model="kinds", sabotage="teacher_of_another_objective"),
)


def run_table(folder: Path) -> Mapping[str, Outcome]:
    """Outcomes of LAYOUTS, BF16_LAYOUTS and FAULTS and of their references, by name."""
    compared = (*LAYOUTS, *BF16_LAYOUTS, *FAULTS)
    return run_all(cases((*(layout.reference for layout in compared), *compared), workspaces(folder)), folder)


def workspaces(folder: Path) -> dict[str, Path]:
    """Writes what the layouts train on; the recipes by `Layout.model`."""
    recipes = {name: make_workspace(folder / name, model, SIZES, **CHANGES) for name, model in MODELS.items()}
    recipes |= {name: _packed_workspace(folder / name, changes) for name, changes in PACKED_RECIPES.items()}
    return recipes | {"kinds": _kinds_workspace(folder / "kinds")}


def cases(layouts: Iterable[Layout], recipes: Mapping[str, Path]) -> list[Case]:
    """What to run for the layouts, each one once."""
    return [
        Case(
            name, each.world, recipes[each.model], each.overrides, each.sabotage, range(1, 1 + STEPS.get(each.model, 2))
        )
        for name, each in {layout.name: layout for layout in layouts}.items()
    ]


def _packed_workspace(folder: Path, changes: dict[str, Any]) -> Path:
    changes = CHANGES | {"objectives": CHANGES["objectives"] | changes["objectives"]}
    if changes["objectives"]["long_text"] is None:
        write_model("qwen3_tied", folder / "large", sizes=LARGE)
        changes |= {"teacher": {"hf": "large"}}
    return make_workspace(folder, "llama_3", SIZES, **changes)


def _kinds_workspace(folder: Path) -> Path:
    make_workspace(folder, "llama_3", SIZES, **CHANGES)
    write_perturbed(folder / "model", folder / "other", seed=12)
    objectives = all_kinds(SIZES["num_hidden_layers"])
    objectives["own_relations"]["teacher"] = {"hf": "other"}
    return write_recipe(folder, objectives=objectives)


def differences(layout: Layout, outcomes: Mapping[str, Outcome]) -> dict[str, float]:
    """From one process on the same recipe; see `Outcome.difference`."""
    return outcomes[layout.name].difference(outcomes[layout.reference.name])


def markdown(outcomes: Mapping[str, Outcome]) -> str:
    """The table of the docs."""
    keys = ("tensor", "sequence", "pipeline", "virtual_pipeline", "layers_per_chunk", "context")
    lines = [
        "| ranks | tensor | sequence | pipeline | virtual | layers per chunk | context | data | recompute | model "
        "| losses | gradient norm | weights |",
        "| " + " | ".join(["---"] * 13) + " |",
    ]
    for layout in LAYOUTS:
        tensor, sequence, pipeline, virtual, sizes, context = (layout.parallel.get(key) for key in keys)
        replicas = layout.world // ((tensor or 1) * (pipeline or 1) * (context or 1))
        model = layout.model + (", few layers taught" if layout.few_layers else "")
        cells = [
            layout.world,
            tensor or 1,
            "yes" if sequence else "",
            pipeline or 1,
            virtual or "",
            sizes or "",
            f"{context or 1}{', whole sequences' if layout.whole_sequences else ''}",
            replicas,
            layout.recompute,
            model,
            *(f"{value:.0e}" for value in differences(layout, outcomes).values()),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print(markdown(run_table(Path(temporary))))
