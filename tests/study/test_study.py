"""A small study from its file to its page; what is there is not made again; what cannot work is told before."""

import json
import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from longred_megatron.errors import UserError
from longred_megatron.recipe import load_recipe, read_phases
from longred_megatron.recipe.checks import check_phases
from longred_megatron.study.members import Merged, Trained, members
from longred_megatron.study.settings import load_study
from tests.evaluation.conftest import byte_tokenizer
from tests.training.workspace import make_workspace
from tools.study import main

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "recipes/studies").glob("*.yaml"))
TEXT = " ".join(f"word{i % 89} and {i * i % 1009}" for i in range(4000))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    make_workspace(folder, sizes={"vocab_size": 258, "max_position_embeddings": 128})
    for model in ("model", "teacher"):
        byte_tokenizer().save_pretrained(folder / model)
    (folder / "texts").mkdir()
    for part in range(4):
        (folder / "texts" / f"{part}.txt").write_text(TEXT[part * 10_000 : (part + 1) * 10_000])
    return folder


def write_study(folder: Path, **sections: Any) -> Path:
    values: dict[str, Any] = {
        "title": "A study",
        "original": "model",
        "dir": "study",
        "seeds": [1, 2],
        "overrides": ["training.steps=1", "optimizer.eps=1.0e-6"],
        "runs": {
            "all": {"recipe": "recipe.yaml"},
            "taught": {"recipe": "recipe.yaml", "seeds": [1], "overrides": ["teacher.hf=$all", "optimizer.lr=1.0e-2"]},
        },
        "merges": {"half": {"run": "all", "weights": [0.5]}},
        "evaluation": {
            "short_texts": ["texts"], "long_texts": ["texts"], "short_windows": 4, "long_windows": 2,
            "lengths": [256], "depths": 2, "prompt_sets": 1, "samples": 1,
        },
        "orderings": [{"measure": "short", "better": "original", "than": "taught", "source": "here"}],
    }  # fmt: skip
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(values | sections))
    return path


def test_from_the_file_to_the_page_and_again(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_study(workspace)
    main([str(path), "--only", "half", "taught", "--launch", sys.executable])
    printed = capsys.readouterr().out
    results = json.loads((workspace / "study/report/results.json").read_text())
    assert {name: len(models) for name, models in results["rows"].items()} == {
        "original": 1, "all": 2, "taught": 1, "half-0.5": 2,
    }  # fmt: skip
    [claim] = results["claims"]
    original, taught = (results["rows"][name][0]["short"] for name in ("original", "taught"))
    gain = sum(b - a for a, b in zip(original, taught, strict=True)) / len(original)
    assert claim["mean"] == pytest.approx(gain) and claim["low"] < gain < claim["high"]
    assert "| half-0.5 | 2 |" in printed and "original better than taught" in printed
    page = (workspace / "study/report/report.html").read_text()
    assert "original better than taught" in page and "<svg" in page
    recipe = yaml.safe_load((workspace / "study/runs/taught/seed-1/recipe.yaml").read_text())
    assert recipe["teacher"]["hf"] == str(workspace / "study/runs/all/seed-1/hf")
    assert recipe["training"]["seed"] == 1 and recipe["training"]["steps"] == 1

    def refuse(*arguments: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(Trained, "make", refuse)
    monkeypatch.setattr(Merged, "make", refuse)
    monkeypatch.setattr("longred_megatron.study.measure.Measurer._losses", refuse)
    main([str(path)])  # figures are read again, too
    assert capsys.readouterr().out.count("is there") == 5
    os.utime(workspace / "study/runs/all/seed-1/hf/model.safetensors")  # as if it had been trained again
    with pytest.raises(AssertionError, match="made again"):
        main([str(path)])
    changed = write_study(workspace, overrides=["training.steps=2"])
    with pytest.raises(UserError, match="was made by another recipe"):
        main([str(changed)])


def test_a_run_that_fails_ends_the_study(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(workspace / "failing", ignore_errors=True)
    path = write_study(workspace, dir="failing")
    with pytest.raises(UserError, match=r"false.*failed with exit code 1"):
        main([str(path), "--launch", "false"])
    with pytest.raises(UserError, match="no-such-program: cannot be started"):
        main([str(path), "--launch", "no-such-program"])


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"runs": {"a": {"recipe": "recipe.yaml", "overides": []}}}, "unknown key `runs.a.overides`; did you mean"),
        ({"runs": {"original": {"recipe": "recipe.yaml"}}, "merges": {}}, "`original`: names of runs"),
        ({"merges": {"half": {"run": "al", "weights": [0.5]}}}, "`merges.half.run` is 'al': no such run"),
        ({"merges": {"half": {"run": "all", "weights": [1.5]}}}, r"`merges.half.weights\[0\]` is 1.5"),
        ({"orderings": [{"measure": "short", "better": "x", "than": "all"}]}, r"`orderings\[0\].better` is 'x'"),
        ({"orderings": [{"measure": "speed", "better": "all", "than": "all"}]}, r"`orderings\[0\].measure` is 'speed'"),
        ({"seeds": []}, "`seeds`"),
        ({"original": None}, "`original` is null"),
    ],
)
def test_problems_of_a_study_file(sections: dict[str, Any], message: str, workspace: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_study(write_study(workspace, **sections))


@pytest.mark.parametrize("text", ["teacher.hf=$later", "teacher.hf=$", "teacher.hf=$all"])
def test_a_name_that_is_no_earlier_run(text: str, workspace: Path) -> None:
    path = write_study(
        workspace, runs={"all": {"recipe": "recipe.yaml", "overrides": [text]}, "later": {"recipe": "r"}}, orderings=[]
    )
    with pytest.raises(UserError, match=r"`runs\.all\.overrides`: .* earlier run \(none\)"):
        members(load_study(path))


def test_a_problem_of_a_recipe_is_told_before_any_run(workspace: Path) -> None:
    runs = {"all": {"recipe": "recipe.yaml"}, "b": {"recipe": "recipe.yaml", "overrides": ["x=1"]}}
    with pytest.raises(UserError, match="unknown key `x`"):
        main([str(write_study(workspace, dir="unsound", runs=runs, orderings=[]))])
    assert not (workspace / "unsound").exists()


def test_an_unknown_name_in_only(workspace: Path) -> None:
    with pytest.raises(UserError, match="--only al: the study has no such run; it has all, half"):
        main([str(write_study(workspace)), "--only", "al"])


def test_what_is_no_study_file(tmp_path: Path) -> None:
    for text, message in (("- 1", "is a mapping"), ("a: [", "not valid YAML"), ("a: 1\na: 2", "already given")):
        (tmp_path / "study.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            load_study(tmp_path / "study.yaml")
    with pytest.raises(UserError, match="no such study file"):
        load_study(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_every_recipe_of_the_studies_here_is_sound(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tiny models up to what their config.json has to say, also of those that a make target makes first in build/;
    the others are not here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    config = json.loads((ROOT / "tests/assets/tiny_base/config.json").read_text())
    for folder in map(Path, re.findall(r"build/[^\s\]]+", path.read_text())):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
    study = load_study(path).model_copy(update={"dir": tmp_path})
    found = members(study)
    for run in [member for member in found if isinstance(member, Trained)]:
        if run.seed in (study.seeds[0], (study.runs[run.row].seeds or study.seeds)[0]):
            recipe = load_recipe(run.recipe, run.overrides)
            if path.name.startswith("tiny"):
                assert check_phases(read_phases(recipe), 2, gpu=False) == [], run.row
                run.hf.mkdir(parents=True)
                window = recipe.model.max_position_embeddings
                (run.hf / "config.json").write_text(json.dumps(config | {"max_position_embeddings": window}))
    seeds = Counter(member.row for member in found)
    alone = {name: len(run.seeds) for name, run in study.runs.items() if run.seeds is not None}
    assert seeds == {row: alone.get(row, len(study.seeds)) for row in study.rows() if row != "original"}
