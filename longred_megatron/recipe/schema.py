"""The recipe: every key, its type, its unit and why its default is what it is. Attribute names = YAML keys.

A section checks its own values; what needs two sections, the architecture or the world is in `checks.py`.
Values are strict: the text "8" is not a number and `true` is not 1. Unknown keys are errors. Objectives and RoPE
methods bring their own keys (`objectives/`, `rope/`).
"""

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from longred_megatron.families.weights import Part
from longred_megatron.layout import Parallel
from longred_megatron.objectives import KINDS, AnyObjective
from longred_megatron.objectives.base import Teacher
from longred_megatron.precision import Precision
from longred_megatron.rope import METHODS, Rope
from longred_megatron.settings import (
    Mark,
    NonNegativeFloat,
    NumTokens,
    PositiveFloat,
    PositiveInt,
    RecipePath,
    Settings,
)

MINUTES_OF_A_YEAR = 525_600  # past some centuries, timers overflow
MAX_PHASES, MAX_OBJECTIVES, MAX_DATA_SETS = 256, 64, 256  # a slip of a loop is told in a second


class Model(Settings):
    """The model that is trained, and its longer window."""

    hf: RecipePath = Field(description="Hugging Face folder: architecture, tokenizer and initial weights")
    rope: Annotated[Rope, Mark.PHASE] = Field(
        "none",
        validate_default=True,
        description=f"how RoPE is scaled: {', '.join(METHODS)}; left out: none, the source's own",
    )
    max_position_embeddings: Annotated[NumTokens, Mark.PHASE] = Field(description="target window, in tokens")


class MicroBatchSize(Settings):
    """The section `step`: what the micro-batches of all objectives have in common."""

    tokens_per_microbatch: NumTokens = Field(
        description="tokens of a micro-batch, the same for all objectives: pipeline messages have one shape"
    )


def _with_kinds(values: Any) -> Any:
    """Objectives with the kind that each has: its own word for it, or its name. Null removes an inherited one."""
    if not isinstance(values, dict):
        return values
    present = {name: value for name, value in values.items() if value is not None}
    if not present:
        raise ValueError(f"needs at least one objective; add one of {', '.join(KINDS)}")
    return {
        name: {"kind": name, **value} if name in KINDS and isinstance(value, dict) else value
        for name, value in present.items()
    }


def _metric_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError("must be letters, digits, _ and -: it is a part of metric names and command-line keys")
    return name


Objectives = Annotated[
    dict[Annotated[str, AfterValidator(_metric_name)], AnyObjective],
    Field(max_length=MAX_OBJECTIVES),
    BeforeValidator(_with_kinds),
    Mark.PHASE,
]
"""What a step trains: a name of the user's -> settings; a name that is a kind needs no `kind`."""


DataPrefix = Annotated[str, Field(min_length=1), Mark.PATH]
"""Of an indexed token file, from tools/prepare_data.py."""

Blend = Annotated[dict[DataPrefix, PositiveFloat], Field(min_length=1)]
"""Weights of data sets; they need not sum to 1."""


class Optimizer(Settings):
    """AdamW and its learning-rate schedule."""

    lr: PositiveFloat = Field(description="peak learning rate")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="course of the learning rate after warm-up; LongReD: constant"
    )
    warmup_steps: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        0, description="steps of linear warm-up from 0; LongReD: none"
    )
    min_lr: NonNegativeFloat = Field(0.0, description="learning rate at the last step of cosine and linear")
    weight_decay: NonNegativeFloat = Field(0.1, description="decoupled weight decay; default as in LongReD")
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Field(strict=False)
    ] = Field((0.9, 0.95), description="Adam's two decay rates; defaults as in LongReD")
    eps: PositiveFloat = Field(1e-8, description="Adam's epsilon; default as in LongReD")
    clip_grad: NonNegativeFloat = Field(1.0, description="largest global gradient norm; 0: no clipping")


class Training(Settings):
    """Length of the run, and what it keeps."""

    steps: Annotated[PositiveInt, Mark.PHASE] = Field(description="optimizer steps")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        2024, description="seed of data order and skipped positions; default as in LongReD"
    )
    recompute: Annotated[Literal["none", "selective", "full"], Mark.PHASE, Mark.FREE] = Field(
        "full",
        description="what backward recomputes; full: least memory for about a third more FLOPs; selective: the MLPs, "
        "which hold most of a layer's memory, and no attention",
    )
    trainable: Annotated[tuple[Part, ...], Field(strict=False, min_length=1)] | None = Field(
        None, description=f"parts of the model that learn, of {', '.join(get_args(Part))}; null: all of them"
    )
    checkpoint_every_steps: Annotated[PositiveInt, Mark.FREE] = Field(
        64, description="steps between checkpoints; one is written after the last step in any case"
    )
    keep_checkpoints: Annotated[PositiveInt, Mark.FREE] = Field(
        3, description="newest checkpoints kept; more than one, so that a damaged one costs little"
    )
    async_save: Annotated[bool, Mark.FREE] = Field(
        False,
        description="writes checkpoints beside the steps that follow, from a copy in the machine's memory; off: needs "
        "no memory, and a full disk is told at the step itself",
    )
    hang_minutes: Annotated[PositiveFloat, Field(le=MINUTES_OF_A_YEAR), Mark.FREE] = Field(
        30.0, description="without progress on a rank before the job ends, naming the rank that holds up the others"
    )


class Debug(Settings):
    """Aids for checking a run."""

    dump_microbatches: Annotated[RecipePath | None, Mark.OUTPUT] = Field(
        None,
        description="folder for every micro-batch as safetensors, one file per step and replica; null: none",
    )


class Run(Settings):
    """Where the results go."""

    dir: RecipePath = Field(description="folder of metrics, checkpoints, export and report")


class Recipe(Settings):
    """A whole run. Made by `load_recipe`, which also makes the paths absolute."""

    model: Model = Field(description="the trained model")
    teacher: Annotated[Teacher, Mark.PHASE] = Field(
        description="the frozen teacher of objectives without one of their own; left out: the model of model.hf"
    )
    step: Annotated[MicroBatchSize, Mark.PHASE] = Field(description="the micro-batch")
    objectives: Objectives = Field(description="what a step trains: name -> settings")
    data: Annotated[dict[str, Blend], Field(max_length=MAX_DATA_SETS), Mark.PHASE] = Field(
        description="data sets: name -> {prefix: weight}"
    )
    parallel: Annotated[Parallel, Mark.FREE] = Field(Parallel(), description="layout over ranks")
    precision: Precision = Field(Precision(), description="number formats")
    optimizer: Annotated[Optimizer, Mark.PHASE] = Field(description="AdamW and its schedule")
    training: Training = Field(description="length of the run")
    debug: Annotated[Debug, Mark.FREE] = Field(Debug(), description="aids for checking a run")
    run: Run = Field(description="where the results go")
    phases: Annotated[tuple[dict[str, Any], ...], Field(strict=False, min_length=1, max_length=MAX_PHASES)] | None = (
        Field(None, description="parts of the run in order, each a mapping of changes to this recipe; see `phases_of`")
    )

    @model_validator(mode="before")
    @classmethod
    def _teacher_defaults_to_model(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
            return values
        teacher = values.get("teacher", {})
        if not isinstance(teacher, dict) or "hf" in teacher or "hf" not in values["model"]:
            return values
        return {**values, "teacher": {**teacher, "hf": values["model"]["hf"]}}

    def teacher_of(self, objective: str) -> Teacher:
        """The teacher that an objective compares with, where it compares with any."""
        return self.objectives[objective].teacher or self.teacher

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of one optimizer step, over all objectives and replicas (M of the step loss)."""
        return sum(settings.microbatches for settings in self.objectives.values())
