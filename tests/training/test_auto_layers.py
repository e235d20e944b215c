"""`layers: {auto: N}`: chosen once, recorded, the same in every layout and in every part of a run."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from longred_megatron.analysis.layer_choice import layer_drift
from longred_megatron.errors import UserError
from longred_megatron.recipe import dump_recipe, load_recipe, phases_of, read_phases
from longred_megatron.recipe.auto_layers import auto_counts, spread, with_layers
from longred_megatron.train import main
from tests.training.test_run import train
from tests.training.workspace import make_workspace, read_metrics, write_recipe

AUTO = "objectives.short_restoration.layers={auto: 2}"


def recorded(run: Path, name: str = "short_restoration") -> Any:
    return yaml.safe_load((run / "recipe.yaml").read_text())["objectives"][name]["layers"]


def test_every_layout_and_part_of_a_run_trains_the_layers_that_drift(tmp_path: Path) -> None:
    path = make_workspace(tmp_path)
    chosen = layer_drift(read_phases(load_recipe(path))[0]).chosen(2)
    assert chosen[-1] == 4 and sorted(chosen) != spread(2, 4)  # or the placeholder would do
    run = tmp_path / "run"
    out = train(path, AUTO, "parallel={tensor: 2}", "training.steps=1", ranks=2)
    assert f"layers: {{auto: 2}} -> {chosen}" in out
    assert recorded(run) == recorded(run / "checkpoints/step-000001") == recorded(run / "hf") == sorted(chosen)
    assert f"loss/short_restoration/layer_{chosen[0]}" in (run / "metrics.jsonl").read_text()
    # Every rank trains them: the numbers are those of one process that is told the layers.
    explicit = f"objectives.short_restoration.layers={sorted(chosen)}"
    train(path, explicit, "training.steps=1", f"run.dir={tmp_path}/told")
    [auto], [told] = read_metrics(run), read_metrics(tmp_path / "told")
    for key in ("loss", "loss/short_restoration", "grad_norm"):
        assert auto[key] == pytest.approx(told[key], rel=1e-4)
    # Another choice in the record stands for one that another machine made.
    text, other = (run / "recipe.yaml").read_text(), [1 if chosen[0] != 1 else 2, 4]
    assert text.count(f"layers: {sorted(chosen)}") == 1
    (run / "recipe.yaml").write_text(text.replace(f"layers: {sorted(chosen)}", f"layers: {other}"))
    assert "{auto: 2}" not in train(path, AUTO, "training.steps=2")
    assert recorded(run) == recorded(run / "hf") == other


def test_each_place_of_a_recipe_and_its_phases_is_chosen_for(tmp_path: Path) -> None:
    make_workspace(tmp_path)
    phases = [{"steps": 1}, {"steps": 1, "objectives": {"short_restoration": {"layers": {"auto": 3}}}}]
    recipe = load_recipe(write_recipe(tmp_path, phases=phases), [AUTO])
    assert sorted(auto_counts(recipe)) == [2, 3]
    assert load_recipe(_written(tmp_path, dump_recipe(recipe))) == recipe
    resolved = with_layers(recipe, lambda count: range(count, 0, -1))
    assert [each.objectives["short_restoration"].layers for each in phases_of(resolved)] == [(1, 2), (1, 2, 3)]  # type: ignore[attr-defined]
    assert not auto_counts(resolved)
    spread_out = [phase.recipe.objectives["short_restoration"] for phase in read_phases(recipe)]
    assert [each.layers for each in spread_out] == [(2, 4), (1, 2, 4)]  # type: ignore[attr-defined]


def _written(folder: Path, text: str) -> Path:
    path = folder / "dumped.yaml"
    path.write_text(text)
    return path


def test_it_can_be_rehearsed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(make_workspace(tmp_path)), AUTO, "--rehearse"])
    assert "N layers at equal distances" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["objectives.short_restoration.layers={auto: 5}"], "model.hf has 4 layers; use 4 or less"),
        (["objectives.short_restoration.layers={auto: 0}"], "`objectives.short_restoration.layers.auto` is 0: must be"),
        (["objectives.short_restoration.layers={aut: 2}"], "did you mean `auto`"),
        (["objectives.short_restoration.layers=[1, x]"], r"`objectives.short_restoration.layers\[1\]` is 'x'"),
        ([AUTO, "model.rope=none"], "`model.rope` is none"),
    ],
)
def test_bad_input_is_told(changes: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        main([str(make_workspace(tmp_path)), *changes])
