"""Numbers that are not sane, in config.json, a recipe, a command: an answer within seconds, with the key."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from tests.hostile import bench
from tests.hostile.case import (
    BENCH,
    CACHE,
    DEMO_TEXTS,
    DRIFT,
    EVALUATE,
    FP8,
    MERGE,
    PERTURBATION,
    PLAN,
    PREPARE,
    REHEARSE,
    SELECT,
    STUDY,
    TO_HF,
    TO_MEGATRON,
    TRAIN,
    VECTORS,
    VERIFY,
    Case,
    Prepare,
    writing,
)

HUGE, NAN, INFINITE = 10**15, float("nan"), float("inf")
READERS = (
    ("train", TRAIN),
    ("evaluate", (*EVALUATE, "model")),
    ("hf-to-megatron", (*TO_MEGATRON, "model")),
    ("rehearse", REHEARSE),
    ("merge", (*MERGE, "teacher")),
)
SIZES = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "head_dim",
)
WRONG_SIZES = (0, -4, 2.5, "32", True, [32], {"a": 1}, HUGE, 10**400)
CONFIG: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(SIZES, WRONG_SIZES),
    "rms_norm_eps": (0, -1e-6, NAN, INFINITE, "small", None, 1e300),
    "rope_parameters.rope_theta": (0, -1e4, NAN, INFINITE, "big", None, [1e4]),
    "rope_parameters.rope_type": ("spiral", 5, None),
    "rope_parameters": (5, [1], "default"),
    "hidden_act": ("tanhh", 5, None, ["silu"]),
    "tie_word_embeddings": ("no", 5),
    "attention_bias": ("no", 5),
    "model_type": (5, ["llama"], None, "", "../llama"),
    "quantization_config": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, {"quant_method": "fp8"}, 5),
    "dual_chunk_attention_config": ({"chunk_size": 64, "local_size": 8},),
    "sliding_window": ({"a": 1},),
    "architectures": (["MambaForCausalLM"], 5),
}
# What these mean to transformers is no one's mistake.
HARMLESS = {("sliding_window", 0), ("tie_word_embeddings", 1), ("architectures", 0), ("architectures", 1)}

RECIPE: dict[str, tuple[object, ...]] = {
    "model.max_position_embeddings": (0, -1, 1.5, "x", HUGE, 10**400, NAN, True),
    "model.rope": (
        {"method": "abf", "theta": 0},
        {"method": "abf", "theta": -1.0},
        {"method": "abf", "theta": NAN},
        {"method": "abf", "theta": 1e308},
        {"method": "pi", "factor": 0},
        {"method": "yarn", "factor": -2.0},
        {"method": "yarn", "factor": 1e300},
        {"method": "yarn", "beta_fast": 0.0, "beta_slow": 32.0},
        {"method": "longrope", "short_factor": [], "long_factor": []},
        {"method": "longrope", "short_factor": [0.0] * 4, "long_factor": [NAN] * 4},
        {"method": "dynamic", "factor": INFINITE},
    ),
    "step.tokens_per_microbatch": (0, -256, HUGE, 10**400, 255, 256.0, "256"),
    "objectives.long_text.microbatches": (0, -1, 10**6, HUGE, 1.5),
    "objectives.long_text.sequence_length": (0, -1, HUGE, 10**400, 7),
    "objectives.short_to_long.weight": (-1.0, NAN, INFINITE, 1e39, 1e300),
    "objectives.short_restoration.layers": ([], [0], [-1], [5], [1, 1], [10**30], ["1"], [[1]]),
    "data.texts": ({"texts": 0.0}, {"texts": -1.0}, {"texts": NAN}, {"texts": 1e400}, {}),
    "optimizer.lr": (0.0, -1.0, NAN, INFINITE, 1e39, 1e308),
    "optimizer.betas": ([1.0, 1.0], [0.9], [-0.1, 0.9], [NAN, 0.9], [0.9, 0.95, 0.99]),
    "optimizer.eps": (0.0, -1.0, NAN, 1e300),
    "optimizer.weight_decay": (-1.0, NAN, INFINITE, 1e300),
    "optimizer.clip_grad": (-1.0, NAN, INFINITE),
    "optimizer.warmup_steps": (-1, 10**30, 1.5),
    "optimizer.min_lr": (-1.0, NAN, 1e30),
    "training.steps": (0, -1, 2**63, 10**30, 1.5, "x"),
    "training.seed": (-1, 2**64, 10**30, 1.5),
    "training.checkpoint_every_steps": (0, -1, 1.5),
    "training.keep_checkpoints": (0, -1),
    "training.hang_minutes": (0.0, -1.0, NAN, 1e300),
    "parallel.tensor": (0, -1, 3, 10**9, HUGE),
    "parallel.pipeline": (0, 3, 10**9, HUGE),
    "parallel.context": (0, 3, 10**9, HUGE),
    "parallel.virtual_pipeline": (0, 1, 10**9),
    "parallel.layers_per_chunk": ([], [0], [4, 4], [-4, 8], [10**30]),
}
STRANGE: dict[str, str] = {
    "nested lists by the thousand": "model: " + "[" * 20_000 + "]" * 20_000,
    "nested mappings by the thousand": "model: " + "{a: " * 20_000 + "}" * 20_000,
    "nested blocks": "\n".join(" " * n + f"k{n}:" for n in range(1500)),
    "an anchor that holds itself": "model: &a {hf: *a}",
    "a list that holds itself": "objectives: &a [*a]",
    "100,000 keys": "\n".join(f"key{n}: 1" for n in range(100_000)),
    "a number of 10,000 digits": "training: {steps: 1" + "0" * 10_000 + "}",
    "a hundred bases": "base: recipe.yaml",
    "a date": "training: 2024-01-01",
    "a key that is a list": "? [1, 2]\n: 3",
    "two documents": "a: 1\n---\nb: 2",
    "an unknown alias": "model: *nothing",
    "tabs": "model:\n\thf: x",
    "no mapping": "- 1",
    "a NUL": "model: \0",
    "a megabyte of text": "model: " + "x" * 2_000_000,
}


def cases() -> Iterator[Case]:
    for number, (key, values) in enumerate(CONFIG.items()):
        for place, value in enumerate(values):
            name, command = READERS[(number + place) % len(READERS)]
            code = (0, 2) if (key, place) in HARMLESS else 2
            words = f"{key.split('.')[-1]}|config\\.json|model|window"
            yield Case(
                f"{name}: config.json {key}: {brief(value)}",
                command,
                bench.config(key, value),
                code,
                says=(words,) if code == 2 else (),
                seconds=60 if name == "rehearse" else 10,
            )
    yield from (
        *recipes(),
        *of_analyses(),
        *plans(),
        *studies(),
        *caches(),
        *benches(),
        *command_lines(),
        *merge_weights(),
        *json_files(),
    )


def recipes() -> Iterator[Case]:
    for key, values in RECIPE.items():
        for value in values:
            section, *deeper = key.split(".")
            prepare = setting(key, value)
            words = re.escape(deeper[-1] if deeper else section)
            yield Case(
                f"recipe: {key}: {brief(value)}",
                TRAIN if key != "training.steps" else TRAIN[:3],
                prepare,
                says=(words,),
            )
    for name, text in STRANGE.items():
        yield Case(f"recipe: {name}", TRAIN, writing("recipe.yaml", text), says=("recipe.yaml|model|training",))


def setting(key: str, value: object) -> Prepare:
    """As YAML, or, what only a command line could say, in YAML's words for it."""
    import yaml

    def prepare(folder: Path) -> None:
        path = folder / "recipe.yaml"
        values = yaml.safe_load(path.read_text())
        *sections, last = key.split(".")
        at = values
        for section in sections:
            at = at.setdefault(section, {})
        at[last] = value
        path.write_text(yaml.safe_dump(values))

    return prepare


def of_analyses() -> Iterator[Case]:
    """Flags of select_layers and of the studies."""
    sizes = ("0", "-1", "x", "1.5", str(10**15), "9" * 400)
    select, drift = ("select_layers", SELECT), ("drift", (*DRIFT, "model", "run/hf"))
    vectors, perturbation = ("positional-vectors", (*VECTORS, "model")), ("perturbation", (*PERTURBATION, "model"))
    fp8 = ("fp8", (*FP8, "model"))
    for (name, words), flag, values in (
        (select, "--texts", sizes),
        (select, "--length", sizes),
        (select, "--rope", ("{method: abf, theta: 0}", "spiral", "[1]", "{", "", "{method: pi, factor: .nan}")),
        (drift, "--texts", sizes),
        (drift, "--length", sizes),
        (drift, "--short", sizes),
        (drift, "--scores", ("nan", "x", "0.5")),
        (vectors, "--window", sizes),
        (vectors, "--points", sizes),
        (vectors, "--layers", sizes),
        (perturbation, "--copies", sizes),
        (perturbation, "--skips", sizes[1:]),
        (perturbation, "--thetas", ("0", "-1", "x", "nan", "inf", "1e308")),
        (fp8, "--lengths", sizes),
        (fp8, "--windows", sizes),
    ):
        for value in values:
            yield Case(f"{name} {flag} {brief(value)}", (*words, f"{flag}={value}"), says=(flag[2:],))


GPU = {"memory_bytes": 80e9, "bf16_flops": 1e15, "fp8_flops": None, "memory_bandwidth": 3e12, "link_bandwidth": 4e11}
GPU |= {"network_bandwidth": 5e10}


def plans() -> Iterator[Case]:
    for value in ("0", "-1", "x", "1.5", str(10**15), "9" * 400):
        yield Case(f"plan --gpus {brief(value)}", (*PLAN, f"--gpus={value}"), says=("--gpus",))
        yield Case(f"plan --search --gpus {brief(value)}", (*PLAN, "--search", f"--gpus={value}"), says=("--gpus",))
    for value in ("", "h100", ":", "gpus.yaml:yours"):
        write = writing("gpus.yaml", json.dumps({"gpus": {"mine": GPU}}))
        yield Case(f"plan --gpu {value!r}", (*PLAN, f"--gpu={value}"), write, says=("gpu",))
    for key in GPU:
        for value in (0, -1.0, NAN, INFINITE, "x", 10**400, [1]):
            write = writing("gpus.yaml", json.dumps({"gpus": {"mine": GPU | {key: value}}}))
            name = f"plan --gpu FILE: {key}: {brief(value)}"
            yield Case(name, (*PLAN, "--gpu=gpus.yaml:mine"), write, says=(f"{key}|gpus.yaml",))
    for name, text in STRANGE.items():
        yield Case(
            f"plan --gpu FILE: {name}", (*PLAN, "--gpu=gpus.yaml:mine"), writing("gpus.yaml", text), says=("gpus",)
        )


def studies() -> Iterator[Case]:
    wrong: dict[str, tuple[object, ...]] = {
        "title": (5, None),
        "original": (5, "", None, "nowhere"),
        "dir": (5, "", None, "notes.txt"),
        "seeds": ([], [-1], [2**32], [1.5], 1, ["a"], list(range(1000))),
        "overrides": ("training.steps=1", ["training.stops=1"], [5], ["$one"], ["training.steps=$nothing"]),
        "runs": ({}, [], {"one": {}}, {"original": {"recipe": "recipe.yaml"}}, {"a b": {"recipe": "recipe.yaml"}}),
        "merges": ({"half": {"run": "two", "weights": [0.5]}}, {"half": {"run": "one", "weights": [2]}}),
        "evaluation": ({}, bench.STUDY["evaluation"] | {"lengths": []}, bench.STUDY["evaluation"] | {"samples": 0}),
        "orderings": ([{"measure": "x", "better": "one", "than": "original"}], [{"better": "one"}], 5),
    }
    for key, values in wrong.items():
        for value in values:
            write = writing("study.yaml", json.dumps(bench.STUDY | {key: value}))
            yield Case(
                f"study: {key}: {brief(value)}",
                STUDY[:2] if key == "dir" else STUDY,
                write,
                says=(rf"{key}|study\.yaml|nowhere|runs\.one",),
            )
    for name, text in STRANGE.items():
        yield Case(f"study: {name}", STUDY, writing("study.yaml", text), says=("study.yaml",))
    for value in ("-1", "x", "1.5", "9" * 400):
        yield Case(f"study --seeds {brief(value)}", (*STUDY, f"--seeds={value}"), says=("seeds",))
    for value in ("", "two", "original"):
        yield Case(f"study --only {value!r}", (*STUDY, f"--only={value}"), says=("--only",))
    for value in ("", "nowhere", "'"):
        yield Case(
            f"study --launch {value!r}", (*STUDY, f"--launch={value}"), says=("--launch|nowhere",), writes=("out",)
        )


def caches() -> Iterator[Case]:
    for value in ("", "0", "0-1", "2-1", "1-9", "-1", "x", "1.5", "1-", "9" * 400):
        yield Case(f"cache_targets --steps {brief(value)}", (*CACHE, f"--steps={value}"), says=("--steps",))
    for value in (5, [1], {}, ""):
        write = bench.edit_recipe(teacher={"cache": value})
        yield Case(f"teacher.cache: {brief(value)}", TRAIN, write, says=("teacher.cache",))
    for value in ("bf16", 8, None, "fp4"):
        write = bench.edit_recipe(teacher={"cache": "out", "cache_format": value})
        yield Case(f"teacher.cache_format: {brief(value)}", TRAIN, write, says=("teacher.cache_format",))
    yield Case("cache_targets without a cache", CACHE[:2], says=("teacher.cache",))
    yield Case("a format without a cache", (*TRAIN, "teacher.cache_format=fp8"), says=("teacher.cache",))


def benches() -> Iterator[Case]:
    for value in ("0", "-1", "x", "1.5", str(10**15), "9" * 400):
        for flag in ("--repeats=", "layers=", "sequence_length="):
            yield Case(f"bench {flag}{brief(value)}", (*BENCH, f"{flag}{value}"), says=(flag.strip("-="),))
    for value in ("microbatches=[1]", "microbatches=[0,0,0]", "microbatches=x", "colour=1", "=1", "layers=", "kernel"):
        yield Case(f"bench {value}", (*BENCH, value), says=(re.escape(value.partition("=")[0]),))


def command_lines() -> Iterator[Case]:
    evaluate = (*EVALUATE, "model")
    for flag, values in {
        "--window": ("0", "-1", "1", "x", "1.5", "1e9", str(10**15), "9" * 400),
        "--original-window": ("0", "-1", str(10**15)),
        "--lengths": ("0", "-5", str(10**15)),
        "--depths": ("0", "-1", "1000000", str(10**15)),
        "--tasks": ("", "passkeys", "../passkey", "x" * 300),
        "--prompt-sets": ("0", "-1", str(10**15)),
        "--samples": ("0", "-1", str(10**15)),
        "--keys": ("0", "1", "1000000", str(10**15)),
        "--short-windows": ("0", "-1"),
        "--long-windows": ("0", "-1"),
        "--tokens-per-batch": ("0", "-1"),
        "--seed": ("x", "1.5"),
        "--dtype": ("int4", ""),
        "--device": ("cuda", "tpu"),
    }.items():
        for value in values:
            yield Case(f"evaluate {flag} {brief(value)}", (*evaluate, f"{flag}={value}"), says=(flag,))
    for value in ("-1", str(2**64), "9" * 300):
        yield Case(f"evaluate --seed {brief(value)}", (*evaluate, f"--seed={value}"), code=(0, 2))
    for flag in ("--short-windows", "--long-windows"):  # as many as there are
        yield Case(f"evaluate {flag} 10^15", (*evaluate, f"{flag}={10**15}"), code=(0, 2))
    prepare = (*PREPARE, "corpus")
    yield Case("prepare_data --workers 1000000", (*prepare, "--workers=1000000"), code=(0, 2))
    of_prepare = {"--min-tokens": ("0", "-1", "x", str(10**30)), "--workers": ("0", "-1", "x")}
    for flag, values in (of_prepare | {"--long-share": ("0", "1", "nan", "x"), "--long-tokens": ("5",)}).items():
        for value in values:
            yield Case(f"prepare_data {flag} {brief(value)}", (*prepare, f"{flag}={value}"), says=(flag,))
    for flag, values in {"--share": ("0", "-1", "nan", "inf", "1e300", "x"), "--seed": ("x",)}.items():
        for value in values:
            yield Case(
                f"make_demo_texts {flag} {brief(value)}", (*DEMO_TEXTS, "out", f"{flag}={value}"), says=(flag[2:],)
            )
    for override in (
        "training.steps=",
        "training.steps=1e3",
        "=1",
        "training",
        "training.steps.x=1",
        "--steps=1",
        ".=1",
        "training..steps=1",
        "a" * 5000 + "=1",
        ".".join("a" * 2000) + "=1",
        "phases.0.steps=1",
        "training.steps=[" + "[" * 5000,
        "objectives.x=1",
        "model=null",
        "base=x",
    ):
        yield Case(f"override {brief(override)}", (*TRAIN[:3], override), says=("",))


def merge_weights() -> Iterator[Case]:
    for value in ("-1", "1.5", "nan", "1e999", "x", "9" * 400):
        words = (*MERGE[:1], f"--weight={value}", *MERGE[3:], "teacher")
        yield Case(f"merge --weight {brief(value)}", words, says=("--weight",))


def json_files() -> Iterator[Case]:
    """Files beside a model that are no JSON, or JSON of another kind."""
    texts = {
        "empty": "",
        "no JSON": "{",
        "a list": "[]",
        "null": "null",
        "a number": "5",
        "{}": "{}",
        "nested": "[" * 100_000,
        "a number of 10,000 digits": '{"vocab_size": 1' + "0" * 10_000 + "}",
        "latin-1": b'{"a": "\xe9"}',
        "NUL": "\0" * 100,
        "keys twice": '{"vocab_size": 1, "vocab_size": 258}',
    }
    for name, text in texts.items():
        for reader, command in READERS[:3]:
            yield Case(
                f"{reader}: config.json is {name}",
                command,
                writing("model/config.json", text),
                says=(r"config\.json|model",),
            )
    tokenizers = (("prepare_data", (*PREPARE, "corpus")), ("evaluate", (*EVALUATE, "model")), ("train", TRAIN))
    for name in ("empty", "no JSON", "a list", "null", "{}", "nested", "latin-1"):
        for reader, command in tokenizers:
            yield Case(
                f"{reader}: tokenizer.json is {name}",
                command,
                writing("model/tokenizer.json", texts[name]),
                says=("tokenizer",),
            )
    for name in ("empty", "no JSON", "a list", "nested", "latin-1"):
        for reader, command in (*tokenizers, ("hf-to-megatron", (*TO_MEGATRON, "model"))):
            # A conversion copies it.
            code = (0, 2) if reader == "hf-to-megatron" else 2
            yield Case(
                f"{reader}: tokenizer_config.json is {name}",
                command,
                writing("model/tokenizer_config.json", texts[name]),
                code,
                ("tokenizer",) * (code == 2),
            )
        yield Case(
            f"megatron-to-hf: generation_config.json is {name}",
            (*TO_HF, "converted"),
            writing("model/generation_config.json", texts[name]),
            code=(0, 2),
        )
        yield Case(
            f"verify: config.json is {name}",
            (*VERIFY, "converted"),
            writing("model/config.json", texts[name]),
            says=("config|model",),
        )


def brief(value: object) -> str:
    text = (
        value
        if isinstance(value, str)
        else json.dumps(value)
        if not isinstance(value, int)
        else f"{value:.4g}"
        if abs(value) < 10**300
        else "10^400"
    )
    return text if len(text) < 80 else f"{text[:36]}...{text[-30:]}"
