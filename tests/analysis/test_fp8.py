import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from longred_megatron.analysis.fp8 import RECIPES
from longred_megatron.errors import UserError
from tests.training.workspace import make_workspace
from tools.analyze import main


def test_the_gaps_of_every_recipe_at_every_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_workspace(tmp_path)
    output = tmp_path / "out"
    arguments = ["fp8", "--hf", str(tmp_path / "model"), "--text", str(tmp_path / "texts"), "--output", str(output)]
    main([*arguments, "--lengths", "16", "48", "--windows", "3"])
    main([*arguments, "--lengths", "16", "48", "--windows", "3"])  # over its own earlier results
    results = json.loads((output / "results.json").read_text())
    assert results["emulated"].startswith("Emulated")
    assert [(gap["recipe"], gap["length"]) for gap in results["gaps"]] == [(r, n) for n in (16, 48) for r in RECIPES]
    for gap in results["gaps"]:
        assert gap["num_windows"] == 3 and len(gap["hidden"]) == 4
        assert all(0 < layer < 1 for layer in gap["hidden"])
        assert 0.001 < gap["gradient"] < 1
        assert gap["loss_gap"] == gap["loss"] - gap["loss_bf16"] != 0
    assert len({gap["loss_bf16"] for gap in results["gaps"]}) == 2
    assert load_file(output / "tokens.safetensors")["tokens"].shape == (3, 48)
    page = (output / "report.html").read_text()
    assert "emulated" in page and page.count("<svg") == 3
    assert "mxfp8" in capsys.readouterr().out
    main([*arguments, "--lengths", "16", "48", "--windows", "3", "--forward-only"])
    rest = json.loads((output / "results.json").read_text())["gaps"]
    for gap, before in zip(rest, results["gaps"], strict=True):
        assert gap == before | {"gradient": None}
    assert (output / "report.html").read_text().count("<svg") == 2
    with pytest.raises(UserError, match="--lengths 1: must be 2 to"):
        main([*arguments, "--lengths", "1"])
