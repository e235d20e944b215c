"""The bench: one folder with everything that commands work on, built once, copied for every case.

recipe.yaml  model/ teacher/ (with tokenizers)  texts.bin, .idx   a recipe that trains on random texts
study.yaml   a study of that recipe
run/         two steps of it, exported after each: hf-step-000001/ and hf/
converted/   hf-to-megatron of model
corpus/      a.txt, b.jsonl;  set.bin, .idx, .json: prepare_data of them
notes.txt    the user's own
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

import yaml

from tests.evaluation.conftest import byte_tokenizer
from tests.hostile import case
from tests.training.workspace import make_workspace

NOTES = "my own notes\n"
SIZES = {"vocab_size": 258, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1}

STUDY = {
    "title": "a study",
    "original": "model",
    "dir": "study",
    "seeds": [1],
    "overrides": ["training.steps=1"],
    "runs": {"one": {"recipe": "recipe.yaml"}},
    "merges": {"half": {"run": "one", "weights": [0.5]}},
    "evaluation": {
        "short_texts": ["corpus"],
        "long_texts": ["corpus"],
        "short_windows": 1,
        "long_windows": 1,
        "lengths": [512],
        "depths": 1,
        "prompt_sets": 1,
        "samples": 1,
    },
    "orderings": [{"measure": "short", "better": "original", "than": "one"}],
}

# Run once the files below are there; each (command, folder that it leaves).
COMMANDS = (
    ("train", "recipe.yaml", "training.steps=1"),
    ("train", "recipe.yaml", "training.steps=2"),
    (*case.TO_MEGATRON[:2], "--hf", "model", "--output", "converted"),
    ("prepare_data", "--input", "corpus", "--tokenizer", "model", "--output", "set", "--workers", "1"),
)


def write_inputs(folder: Path) -> None:
    """All that no command makes."""
    make_workspace(folder, sizes=SIZES)
    for model in ("model", "teacher"):
        byte_tokenizer().save_pretrained(folder / model)
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 8))) for _ in range(200)]
    texts = ["\n".join(" ".join(rng.choices(words, k=10)) for _ in range(20)) for _ in range(8)]
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.txt").write_text(texts[0])
    (folder / "corpus" / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[1:]))
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY))
    (folder / "notes.txt").write_text(NOTES)


def edit_recipe(**sections: object) -> case.Prepare:
    """Sets keys of sections of the recipe, or a whole section that is no mapping."""

    def prepare(folder: Path) -> None:
        path = folder / "recipe.yaml"
        values = yaml.safe_load(path.read_text())
        for name, value in sections.items():
            values[name] = values.get(name, {}) | value if isinstance(value, dict) else value
        path.write_text(yaml.safe_dump(values))

    return prepare


def edit_json(path: str, change: Callable[[dict], object]) -> case.Prepare:
    """Lets `change` work on a JSON file's value; what it returns, if anything, takes its place."""

    def prepare(folder: Path) -> None:
        file = folder / path
        values = json.loads(file.read_text())
        changed = change(values)
        file.write_text(json.dumps(values if changed is None else changed))

    return prepare


def config(key: str, value: object) -> case.Prepare:
    """Sets a key of model/config.json; a dotted one lies deeper."""
    *sections, last = key.split(".")

    def change(values: dict) -> None:
        for section in sections:
            values = values.setdefault(section, {})
        values[last] = value

    return edit_json("model/config.json", change)
