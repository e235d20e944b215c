"""The page of tools/select_layers.py: attention drift by layer and head, the choice, and what other RoPEs would do."""

from typing import Any

from longred_megatron.analysis.layer_choice import LayerDrift, rope_name
from longred_megatron.analysis.measure import Drift
from longred_megatron.analysis.page import Study
from longred_megatron.analysis.plots import bars, grids, lines
from longred_megatron.page import Plot
from longred_megatron.recipe import Phase
from longred_megatron.settings import Mark, marked_fields

KIND = "longred-megatron choice of layers"
NUM_LAYERS = 6  # LongReD's M for 32K, where a recipe names none


def num_layers(phase: Phase) -> int:
    """How many layers the recipe distils: of its first objective that names any."""
    for settings in phase.recipe.objectives.values():
        for key in marked_fields(type(settings), Mark.LAYERS):
            return len(getattr(settings, key))
    return min(NUM_LAYERS, phase.source.num_layers)


def layer_study(phase: Phase, found: LayerDrift, count: int) -> Study:
    """What was found, for people."""
    chosen, layers = found.chosen(count), found.drift.layers.tolist()
    num_texts, length = found.tokens.shape
    recipe = phase.recipe
    rows = [["layer", "drift (nats)", "largest head", "similarity", "chosen"]]
    for k in found.ranking:
        head, value = int(found.drift.heads[k - 1].argmax()) + 1, found.drift.heads[k - 1].max().item()
        similarity = found.drift.similarity[k - 1].item()
        mark = "yes" if k in chosen else ""
        rows.append([str(k), f"{layers[k - 1]:.3e}", f"{head}: {value:.3e}", f"{similarity:.4f}", mark])
    return Study(
        KIND,
        f"Layers to distil: {recipe.model.hf.name}, {rope_name(recipe.model.rope)}",
        [
            f"KL(original || extended) of attention, in nats, mean over heads, positions and {num_texts} texts of "
            f"{length:,} tokens; the extended model is {recipe.model.hf} with the recipe's RoPE, before any training.",
            f"layers: {sorted(chosen)}",
            f"By falling drift, the last layer at the end: {chosen}",
            *_sweep_lines(phase, found),
        ],
        rows,
        _figures(phase, found, chosen),
        {
            "recipe_rope": rope_name(recipe.model.rope),
            "hf": str(recipe.model.hf),
            "chosen": chosen,
            "ranking": found.ranking,
            **found.drift.to_json(),
            "sweep": [{"rope": name, **drift.to_json()} for name, drift in found.sweep.items()],
        },
        found.tokens,
    )


def _all(phase: Phase, found: LayerDrift) -> dict[str, Drift]:
    return {f"{rope_name(phase.recipe.model.rope)} (recipe)": found.drift, **found.sweep}


def _sweep_lines(phase: Phase, found: LayerDrift) -> list[str]:
    if not found.sweep:
        return []
    shown = [
        "{}: drift {}, similarity {}, loss {}".format(name, *drift.shown())
        for name, drift in _all(phase, found).items()
    ]
    about = (
        f"What each RoPE alone breaks, before any training (the original's loss is {found.drift.original_loss:.4f}):"
    )
    return [about, *shown, "In brackets: 95 % intervals, over texts."]


def _figures(phase: Phase, found: LayerDrift, chosen: list[int]) -> list[Plot]:
    layers = found.drift.layers.tolist()
    numbers = list(range(1, len(layers) + 1))
    picked = {"chosen": (sorted(chosen), [layers[k - 1] for k in sorted(chosen)])}
    figures = [
        lines(
            {"Attention drift by layer (nats)": {"all": (numbers, layers), **picked}},
            "layers",
            "layer",
            "How much RoPE alone changes where each layer looks. Distil the peaks; if one layer stands far above the "
            "rest, a few layers will do.",
        ),
        grids(
            {"Attention drift by head (nats)": found.drift.heads},
            "heads",
            ("head", "layer"),
            "Dark cells are heads that look elsewhere. A layer with one dark head is as much worth distilling as its "
            "mean says.",
        ),
    ]
    if found.sweep:
        every = _all(phase, found)
        panels: dict[str, Any] = {
            "loss added (nats a token)": {name: drift.loss - drift.original_loss for name, drift in every.items()},
            "similarity lost": {name: 1 - drift.similarity.mean().item() for name, drift in every.items()},
            "drift (nats)": {name: drift.layers.mean().item() for name, drift in every.items()},
        }
        caption = (
            "What training will have to repair. Among those that reach the window, take the one that breaks least."
        )
        figures.append(bars(panels, "sweep", caption))
    return figures
