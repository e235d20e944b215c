"""An example of every kind of objective, made from its class: what the tests that walk over all kinds train."""

from typing import Any, Literal, get_args, get_origin

from longred_megatron.objectives import KINDS
from longred_megatron.objectives.base import Objective
from longred_megatron.settings import Mark, marked_fields, tags

ALL = list(dict.fromkeys(KINDS.values()))
# Beside the example, what else of a kind is compared with its reference.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "next_token": [{"mask_documents": True}],
    "packed_distillation": [
        {"mask_documents": True, "restart_positions": True, "top_k": 5, "temperature": 2.0},
        {"direction": "reverse", "cross_entropy": 0.25},
        {"draws": 7, "temperature": 2.0, "cross_entropy": 0.25},
    ],
    "perturbed_positions": [{"variant": "cyclic"}, {"longest_skip": 100}],
    "short_restoration": [{"states": "attention_output"}],
    "short_to_long": [{"positions": "uniform"}],
}


def name_of(kind: type[Objective]) -> str:
    """The first of the kind's names."""
    return tags(kind, "kind")[0]


def example(kind: type[Objective], num_layers: int, **changes: Any) -> dict[str, Any]:
    """Settings of a kind for a model of `num_layers` layers and a window of 64 tokens: a value for all it asks for."""
    values: dict[str, Any] = {
        "kind": name_of(kind),
        "microbatches": 2,
        "sequence_length": 64,
        "data": "texts",
        "weight": 1.0 + ALL.index(kind),  # no two are the same
    }
    of_layers = marked_fields(kind, Mark.LAYERS)
    for name, field in kind.model_fields.items():
        if name in values or not field.is_required():
            continue
        if name in of_layers:
            values[name] = [1, num_layers // 2 + 1, num_layers]
        elif get_origin(field.annotation) is Literal:
            values[name] = get_args(field.annotation)[0]
        else:
            assert field.annotation in (int, float), f"{kind.__name__}.{name}: give it a default, or an example here"
            values[name] = field.annotation(1)
    return values | changes


def all_kinds(num_layers: int) -> dict[str, dict[str, Any]]:
    """The section `objectives` with every kind and variant, under names that are not kinds."""
    return {
        f"own_{name_of(kind)}" + (f"_{number}" if number else ""): example(kind, num_layers, **changes)
        for kind in ALL
        for number, changes in enumerate(({}, *VARIANTS.get(name_of(kind), [])))
    }
