"""The demo's parts that can be checked in seconds; `make demo` itself takes six minutes, and CI does not run it."""

from pathlib import Path

from longred_megatron.recipe import check_phases, load_recipe, read_phases

ROOT = Path(__file__).parents[1]


def test_both_runs_train_the_same_long_texts() -> None:
    longred, cpt = (load_recipe(ROOT / "recipes" / f"tiny_{name}.yaml") for name in ("longred_c", "long_cpt"))
    for recipe in (longred, cpt):
        assert check_phases(read_phases(recipe), 2) == []
    assert longred.objectives["long_text"] == cpt.objectives["long_text"]
    assert longred.data["long"] == cpt.data["long"]
    assert longred.training == cpt.training and longred.optimizer == cpt.optimizer
    assert longred.model == cpt.model


def test_the_assets_stay_small() -> None:
    files = [path for path in (ROOT / "tests" / "assets").rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    assert sum(path.stat().st_size for path in files) < 10e6
