"""The README's commands, typed as they stand there, on a small model under the name they use."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.training.workspace import make_workspace, write_perturbed

ROOT = Path(__file__).parents[1]
TINY_TOKENIZER = ROOT / "tests" / "assets" / "tiny_base"
SECTION = "## Extend your own model"


def commands(section: str) -> list[str]:
    """The shell lines of a README section, continued lines joined, comments left out."""
    text = (ROOT / "README.md").read_text()
    body = text[text.index(section) : text.index("\n## ", text.index(section) + 1)]
    blocks = re.findall(r"```sh\n(.*?)```", body, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the files the commands name: small ones."""
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    recipe = make_workspace(tmp_path)  # writes model, teacher, texts, recipe.yaml
    model = tmp_path / "models" / "Meta-Llama-3-8B"
    rebuild_with_tokenizer(tmp_path / "model", model)
    write_perturbed(model, tmp_path / "teacher")
    texts = tmp_path / "texts" / "books"
    texts.mkdir(parents=True)
    for name in ("argparse", "textwrap", "typing"):
        source = Path(__import__(name).__file__ or "").read_text()
        (texts / f"{name}.txt").write_text(source)
    settings = yaml.safe_load(recipe.read_text())
    settings["model"]["hf"] = "../models/Meta-Llama-3-8B"
    settings["teacher"]["hf"] = "../teacher"
    settings["data"] = {"texts": {"../data/long_books": 1.0}}
    settings["training"] |= {"checkpoint_every_steps": 2}
    settings["run"]["dir"] = "../runs/llama3_8b_32k_longred_c"
    path = tmp_path / "recipes" / "llama3_8b_32k_longred_c.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(settings))
    return tmp_path


def rebuild_with_tokenizer(model: Path, output: Path) -> None:
    """The workspace's model with the tiny tokenizer and a vocabulary and window to go with it."""
    import shutil

    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    config.vocab_size = 1600  # more than the tokenizer's 1536, as released models pad
    AutoModelForCausalLM.from_config(config).save_pretrained(output)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_TOKENIZER / name, output)


# What a test machine cannot do as it stands: eight ranks, a hundred steps, documents of 32K tokens, 512 steps.
SMALLER = {
    "--nproc-per-node 8": "--nproc-per-node 2",
    "training.steps=100": "training.steps=2",
    "--min-tokens 32768": "--min-tokens 100",
    "step-000512": "step-000002",
}


def test_the_commands_work_in_their_order(project: Path) -> None:
    lines = commands(SECTION)
    assert len(lines) == 9
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    used = set()
    for line in lines:
        for large, small in SMALLER.items():
            if large in line:
                used.add(large)
                line = line.replace(large, small)
        if "evaluate.py" in line:  # the window of 64 tokens leaves no room for four keys
            line += " --keys 2 --prompt-sets 1 --samples 1 --long-windows 2 --short-windows 2"
        done = subprocess.run(
            line, shell=True, cwd=project, env=environment, text=True, capture_output=True, timeout=400
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert used == set(SMALLER)
    assert (project / "report" / "report.html").exists()
    assert (project / "exported" / "model.safetensors").exists()
    assert (project / "runs/llama3_8b_32k_longred_c/hf/config.json").exists()
