"""`--rehearse`: cluster recipes, unchanged, on this machine's CPU."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longred_megatron.checkpoint.weight_files import WeightFiles
from longred_megatron.errors import UserError
from longred_megatron.families import read_architecture
from longred_megatron.parallel.groups import destroy, initialize
from longred_megatron.parallel.local_ranks import run_ranks
from longred_megatron.recipe import check_phases, dump_recipe, load_recipe, phases_of, read_phases
from longred_megatron.training.microbatches import MicroBatchSource
from longred_megatron.training.rehearsal import SIZES, Rehearsal, shrink
from longred_megatron.training.run import build
from longred_megatron.training.small_copy import write_model as write_small_model
from tests.checkpoint.small_models import ONE_OF_EACH_FAMILY, write_model

RECIPES = Path(__file__).parents[2] / "recipes"
LLAMA_3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
LLAMA_3_1_8B = LLAMA_3_8B | {
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
TINY = LLAMA_3_8B | {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
CONFIGS = {
    "llama3_8b": LLAMA_3_8B,
    "llama3_2_1b": LLAMA_3_1_8B
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "rope_parameters": LLAMA_3_1_8B["rope_parameters"] | {"factor": 32.0},
    },
    "mistral": LLAMA_3_8B
    | {"model_type": "mistral", "vocab_size": 32768, "max_position_embeddings": 32768, "sliding_window": None},
    "smollm2": LLAMA_3_8B
    | {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 2048,
    },
    "tiny": TINY,
}
TEACHERS = {
    "llama3_2_1b_128k_packed": LLAMA_3_1_8B,
    "llama3_8b_128k_packed": LLAMA_3_1_8B,
    "tiny_packed_distillation": TINY | {"max_position_embeddings": 2048},
}


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def model_folder(recipe: str, folder: Path) -> Path:
    """A folder with the config.json of the recipe's model and nothing else."""
    [family] = [name for name in CONFIGS if recipe.startswith(name)]
    return write_config(folder / family, CONFIGS[family])


def hf_overrides(name: str, folder: Path) -> list[str]:
    """A recipe's models as config.json alone, written to `folder`."""
    hf = [f"model.hf={model_folder(name, folder)}"]
    if name in TEACHERS:
        hf.append(f"teacher.hf={write_config(folder / 'teacher', TEACHERS[name])}")
    if name.endswith("restored"):  # the model is a second teacher there
        hf += [f"teacher.hf={write_config(folder / 'teacher', LLAMA_3_1_8B)}"]
        hf += [f"objectives.short_restoration.teacher.hf={model_folder(name, folder)}"]
    return hf


def shrunk(name: str, folder: Path, *overrides: str) -> Rehearsal:
    recipe = load_recipe(RECIPES / f"{name}.yaml", [*hf_overrides(name, folder), *overrides])
    (folder / "out").mkdir(exist_ok=True)
    return shrink(recipe, folder / "out")


def test_a_cluster_recipe_is_rehearsed_in_its_own_layout(tmp_path: Path) -> None:
    name = "llama3_8b_32k_longred_c"
    hf = model_folder(name, tmp_path)
    command = [sys.executable, "-m", "longred_megatron.train", str(RECIPES / f"{name}.yaml")]
    fewer = [f"objectives.{name}.microbatches={n}" for name, n in (("long_text", 2), ("short_to_long", 1))]
    overrides = [f"model.hf={hf}", f"run.dir={tmp_path}/run", *fewer, "objectives.short_restoration.microbatches=1"]
    done = subprocess.run([*command, *overrides, "--rehearse"], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr  # no rank lets a library talk
    out = done.stdout
    assert "8 = tensor 2 x pipeline 2 x context 2 x data 1, 2 chunks a stage" in out
    assert "resuming after step 2" in out and "step 3/3" in out
    assert out.count("1-8, 17-24, embedding") == 4 and out.count("9-16, 25-32, head") == 4
    assert out.count("9, 12, 14, 15, 32") == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama3_8b"]


def build_all(join: Callable[[str], None], recipes: list[Path]) -> None:
    for i, path in enumerate(recipes):
        join(str(i))
        recipe = load_recipe(path)
        groups = initialize(recipe.parallel, recipe.training.seed)
        for phase in read_phases(recipe):
            run = build(phase, MicroBatchSource(phase), groups)
            layers = {number for chunk in run.chunks for number in chunk.layer_numbers()}
            assert len(layers) == phase.source.num_layers // recipe.parallel.pipeline
        destroy()


def test_every_rank_of_every_recipe_is_built(tmp_path: Path) -> None:
    worlds: dict[int, list[Path]] = {}
    for path in sorted(RECIPES.glob("*.yaml")):
        if path.stem in ("llama3_8b_32k", "tiny_512") or path.stem.startswith("tiny_base"):
            continue  # bases of other recipes; training runs of one process
        folder = tmp_path / path.stem
        folder.mkdir()
        rehearsal = shrunk(path.stem, folder)
        (folder / "recipe.yaml").write_text(dump_recipe(rehearsal.recipe))
        worlds.setdefault(rehearsal.num_ranks, []).append(folder / "recipe.yaml")
    assert sum(map(len, worlds.values())) >= 25
    for world, recipes in worlds.items():
        run_ranks(build_all, world, recipes)


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_a_small_model_of_every_family(name: str, tmp_path: Path) -> None:
    source = write_model(name, tmp_path / "source")
    big = read_architecture(source)
    folder = write_small_model(source, big, 48, 2, 2, SIZES, tmp_path / "small")
    small = read_architecture(folder)
    with WeightFiles(folder) as files:
        files.check(small)
    assert (small.family, small.num_layers) == (big.family, big.num_layers)
    assert (small.hidden_size, small.num_kv_heads, small.max_position_embeddings) == (48, 2, 32)
    assert small.num_attention_heads * big.num_kv_heads == big.num_attention_heads * small.num_kv_heads


def test_a_rehearsal_of_fp8_phases_has_none_and_checks_them(tmp_path: Path) -> None:
    phases = "phases=[{training: {steps: 4}}, {precision: {fp8: hybrid, fp8_recipe: delayed}, training: {steps: 4}}]"
    rehearsal = shrunk("llama3_8b_32k_longred_c", tmp_path, phases)
    assert {phase.precision.fp8 for phase in phases_of(rehearsal.recipe)} == {None}
    assert any(change.startswith("precision.fp8: hybrid -> null") for change in rehearsal.changes)
    with pytest.raises(UserError, match="FP8 products and attention take bf16"):
        shrunk("llama3_8b_32k_longred_c", tmp_path, "precision={params: fp32, fp8: hybrid}")


def test_what_is_kept_and_what_is_not(tmp_path: Path) -> None:
    big = load_recipe(RECIPES / "llama3_8b_32k_longred_c.yaml")
    small = shrunk("llama3_8b_32k_longred_c", tmp_path, "precision.fp8=hybrid").recipe
    assert small.parallel == big.parallel and small.precision.fp8 is None
    for name, settings in big.objectives.items():
        own = small.objectives[name]
        factor = settings.sequence_length // own.sequence_length
        assert own == settings.model_copy(update={"sequence_length": own.sequence_length})
        assert big.step.tokens_per_microbatch == factor * small.step.tokens_per_microbatch
        assert big.model.max_position_embeddings == factor * small.model.max_position_embeddings
    architecture = read_architecture(small.model.hf)
    assert architecture.num_layers == 32
    assert architecture.num_attention_heads == 4 * architecture.num_kv_heads


def test_a_rope_with_a_number_for_each_pair_is_cut_to_small_heads(tmp_path: Path) -> None:
    factors = [1 + i / 16 for i in range(64)]
    rope = f"{{method: longrope, short_factor: {factors}, long_factor: {factors}}}"
    small = shrunk("llama3_8b_32k_longred_c", tmp_path, f"model.rope={rope}").recipe
    assert small.model.rope.model_dump()["long_factor"] == (1.0, 2.0, 3.0, 4.0)
    assert not check_phases(read_phases(small), 8)
    scaled = {"rope_type": "longrope", "rope_theta": 5e5, "short_factor": factors, "long_factor": factors}
    scaled |= {"factor": 2.0, "original_max_position_embeddings": 4096}
    hf = write_config(tmp_path / "scaled", LLAMA_3_8B | {"rope_parameters": scaled})
    (tmp_path / "out-2").mkdir()
    recipe = load_recipe(RECIPES / "llama3_8b_32k_longred_c.yaml", [f"model.hf={hf}"])
    source = read_architecture(shrink(recipe, tmp_path / "out-2").recipe.model.hf)
    assert source.rope["short_factor"] == [1.0, 2.0, 3.0, 4.0]
    assert source.rope["original_max_position_embeddings"] == source.max_position_embeddings // 2


def test_a_layout_of_too_many_ranks_is_made_smaller_and_said_to_be(tmp_path: Path) -> None:
    rehearsal = shrunk("llama3_8b_32k_longred_c", tmp_path, "parallel.tensor=8", "parallel.pipeline=4")
    assert rehearsal.num_ranks == 16 and rehearsal.recipe.parallel.tensor == 2
    assert "parallel.tensor: 8 -> 4, to fit on 16 ranks" in rehearsal.changes
    with pytest.raises(UserError, match=r"parallel.pipeline=16 --rehearse"):
        shrunk(
            "llama3_8b_32k_longred_c",
            tmp_path,
            "parallel.tensor=1",
            "parallel.context=1",
            "parallel.pipeline=32",
            "parallel.sequence=false",
        )


def test_a_recipe_that_cannot_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="8 key/value heads"):
        shrunk("llama3_8b_32k_longred_c", tmp_path, "parallel.tensor=3")
