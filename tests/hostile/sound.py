"""Nothing is wrong: every command works on the bench, and leaves only its output."""

from collections.abc import Iterator

from tests.hostile.case import (
    CACHE,
    DEMO_TEXTS,
    DRIFT,
    EVALUATE,
    FP8,
    MERGE,
    PERTURBATION,
    PLAN,
    PREPARE,
    QUERIES,
    REHEARSE,
    RESUME,
    SELECT,
    STUDY,
    TO_HF,
    TO_MEGATRON,
    TRAIN,
    VECTORS,
    VERIFY,
    Case,
)


def cases() -> Iterator[Case]:
    yield Case("train", TRAIN, code=0)
    yield Case("train goes on", RESUME, code=0, writes=("run",), says=("resuming after step 2",))
    yield Case("train, all is done", (*RESUME[:2], "training.steps=2"), code=0, writes=("run",), says=("done",))
    yield Case("prepare_data", (*PREPARE, "corpus"), code=0)
    yield Case("evaluate", (*EVALUATE, "model"), code=0)
    yield Case("hf-to-megatron", (*TO_MEGATRON, "model"), code=0)
    yield Case("megatron-to-hf of a conversion", (*TO_HF, "converted"), code=0)
    yield Case("megatron-to-hf of a run", (*TO_HF, "run/checkpoints/step-000002"), code=0)
    yield Case("verify", (*VERIFY, "converted"), code=0)
    yield Case("merge", (*MERGE, "teacher"), code=0)
    yield Case("select_layers", SELECT, code=0, says=("layers:",))
    yield Case("analyze drift", (*DRIFT, "model", "run/hf", "--runs", "run"), code=0, seconds=90)
    yield Case("analyze positional-vectors", (*VECTORS, "model", "run/hf"), code=0, seconds=30)
    yield Case("analyze perturbation", (*PERTURBATION, "model", "run/hf"), code=0)
    yield Case("analyze query-states", (*QUERIES, "model", "run/hf"), code=0)
    yield Case("analyze fp8", (*FP8, "model"), code=0)
    yield Case("plan", PLAN, code=0)
    yield Case("plan --search", (*PLAN, "--search"), code=0, seconds=60)
    yield Case("study --list", (*STUDY[:2], "--list"), code=0, says=("to make",))
    yield Case("study", STUDY, code=0, seconds=180, quick=False)
    yield Case("cache_targets", CACHE, code=0, says=("computed",))
    yield Case("train with a cache", (*TRAIN, "teacher.cache=targets"), code=0, writes=("targets",))
    yield Case("bench --list", ("bench", "--list"), code=0, says=("longred_step",))
    yield Case("make_demo_texts", (*DEMO_TEXTS, "out"), code=0)
    yield Case("rehearse", REHEARSE, code=0, seconds=120, quick=False)
