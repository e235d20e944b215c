"""A run says at its start which texts have no start token although the tokenizer opens texts with one."""

from pathlib import Path

import pytest

from longred_megatron.recipe import load_recipe, read_phases
from longred_megatron.train import _announce
from longred_megatron.training.microbatches import open_data
from tests.evaluation.conftest import byte_tokenizer
from tests.training.workspace import make_workspace, write_recipe
from tools.prepare_data import main


@pytest.mark.parametrize("bos", [False, True])
def test_the_start_of_a_run(bos: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_workspace(tmp_path, sizes={"vocab_size": 258})
    byte_tokenizer(bos=True).save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text("some words and more of them " * 100)
    words = ["--input", str(tmp_path / "a.txt"), "--tokenizer", str(tmp_path / "model"), "--workers", "1"]
    main([*words, "--output", str(tmp_path / "set"), *["--bos"] * bos])
    recipe = load_recipe(write_recipe(tmp_path, data={"texts": {"set": 1.0}}))
    phases = read_phases(recipe)
    _announce(recipe, phases, open_data(phases), 1)
    said = f"no start token: the documents of {tmp_path / 'set'} have none" in capsys.readouterr().out
    assert said == (not bos)
