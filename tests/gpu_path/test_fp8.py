"""What the project says of FP8, against Transformer Engine's own choice; and the scales that it keeps."""

from tests.gpu_path import install

# isort: split

import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import transformer_engine_torch as tex
from megatron.core.fp8_utils import get_fp8_recipe
from megatron.core.process_groups_config import ProcessGroupCollection
from transformer_engine.pytorch import quantization
from transformer_engine.pytorch.attention.dot_product_attention import utils

from longred_megatron import train
from longred_megatron.checkpoint import distributed
from longred_megatron.errors import UserError
from longred_megatron.layout import Parallel
from longred_megatron.model.attention_backends import ENVIRONMENT, _backend, attention_choices, attention_problems
from longred_megatron.model.fp8 import forget_models, sharded_scales
from longred_megatron.model.megatron_config import transformer_config
from longred_megatron.parallel.groups import destroy, initialize
from longred_megatron.precision import Card, Precision, Scaling, Sizes
from longred_megatron.recipe import load_recipe, read_phases
from longred_megatron.training import run
from longred_megatron.training.microbatches import open_data
from longred_megatron.training.run import PhaseRun
from tests.recipe.conftest import LLAMA3_8B
from tests.training.workspace import build_run, make_workspace

CAPABILITIES = ((8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))
CUDNN = ((9, 7, 0), (9, 10, 0), (9, 13, 0), (9, 20, 0), (9, 21, 0), (9, 23, 0))
HEAD_DIMS = (40, 64, 96, 128, 256)
BSHD = {"qkv_layout": "bshd_bshd_bshd", "attn_mask_type": "causal"}
THD = {"qkv_layout": "thd_thd_thd", "attn_mask_type": "padding_causal", "num_tokens_q": 4096, "num_tokens_kv": 4096}


@pytest.fixture
def on_card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Transformer Engine answers as on this card."""

    def on_card(card: Card) -> None:
        for module in (utils, quantization):
            monkeypatch.setattr(module, "get_device_compute_capability", lambda: card.capability)
        monkeypatch.setattr(utils, "torch", torch)  # `install` lets fp32 pass for fp16
        monkeypatch.setattr(utils, "get_cudnn_version", lambda: card.cudnn)
        monkeypatch.setattr(torch.version, "cuda", f"{card.cuda[0]}.{card.cuda[1]}")
        monkeypatch.setattr(tex, "get_fused_attn_backend", lambda params: compiled_choice(params, card))

    return on_card


def compiled_choice(params: Any, card: Card) -> tuple[Any, str]:
    """The compiled half of the choice: the conditions of FP8 in `nvte_get_fused_attn_backend` of Transformer Engine's
    transformer_engine/common/fused_attn/fused_attn.cpp, which newer versions leave to cuDNN's own answer."""
    backends = tex.NVTE_Fused_Attn_Backend
    if not params.qkv_dtype.name.startswith("kFloat8"):
        return backends.NVTE_F16_arbitrary_seqlen, ""
    dims = {params.head_dim_qk, params.head_dim_v}
    if card.capability < (9, 0):
        fits = False
    elif card.capability < (10, 0):
        fits = dims == {128} if params.is_training else max(dims) <= 256
    else:
        fits = max(dims) <= 128
    fits = fits and all(dim % 16 == 0 for dim in dims) and card.cudnn >= (9, 7, 0) and card.cudnn != (9, 10, 0)
    return (backends.NVTE_FP8 if fits and "THD" not in params.qkv_layout.name else backends.NVTE_No_Backend), "cuDNN"


def phase(precision: Precision) -> Any:
    return SimpleNamespace(recipe=SimpleNamespace(parallel=Parallel(), precision=precision))


def settings(head_dim: int, **layout: Any) -> dict[str, Any]:
    sizes = {"num_heads": 32, "num_gqa_groups": 8, "head_dim_qk": head_dim, "head_dim_v": head_dim, "batch_size": 1}
    return sizes | {"max_seqlen_q": 4096, "max_seqlen_kv": 4096} | layout


def transformer_engine_takes(precision: Precision, head_dim: int, **layout: Any) -> bool:
    """Whether linear layers and attention run, and attention in FP8 if it is asked for."""
    recipe = _recipe(precision)
    support = {
        "blockwise": quantization._compute_fp8_block_scaling_support,
        "mxfp8": quantization._compute_mxfp8_support,
    }.get(precision.scaling or "", quantization._compute_fp8_support)
    if not (quantization._compute_fp8_support()[0] and support()[0]):
        return False
    if not precision.fp8_attention:
        return True
    backend = _backend(settings(head_dim, **layout), LLAMA3_8B, phase(precision), precision, True)
    return recipe.fp8_dpa and backend is not None


def _recipe(precision: Precision) -> Any:
    return get_fp8_recipe(transformer_config(LLAMA3_8B, Parallel(), precision))


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("scaling", get_args(Scaling))
def test_refused_is_what_transformer_engine_refuses(scaling: Scaling, attention: bool, on_card: Any) -> None:
    precision = Precision(fp8="hybrid", fp8_recipe=scaling, fp8_attention=attention)
    taken = 0
    for capability in CAPABILITIES:
        for cudnn in CUDNN:
            for cuda in ((12, 8), (13, 0)):
                card = Card(capability, cudnn, cuda)
                on_card(card)
                for head_dim in HEAD_DIMS:
                    ours = list(precision.problems(Sizes(4096, {}, {"model.hf": head_dim}), card))
                    takes = transformer_engine_takes(precision, head_dim, **BSHD)
                    assert (not ours) == takes, (card, head_dim, ours)
                    taken += takes
    assert (taken > 0) == (scaling != "blockwise" or not attention)


@pytest.mark.parametrize("capability", [(9, 0), (10, 0)])
def test_packed_documents_have_no_fp8_attention(capability: tuple[int, int], on_card: Any) -> None:
    """`objectives.shared.masked_problems` refuses them on every card."""
    on_card(Card(capability, (9, 21, 0), (13, 0)))
    precision = Precision(fp8="hybrid", fp8_attention=True)
    assert transformer_engine_takes(precision, 128, **BSHD)
    assert not transformer_engine_takes(precision, 128, **THD)


def test_fp32_has_no_attention_but_the_unfused(on_card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on_card(Card((9, 0), (9, 20, 0), (13, 0)))
    backend = {}
    for unfused in ("0", "1"):
        monkeypatch.setenv("NVTE_UNFUSED_ATTN", unfused)
        for params in ("fp32", "bf16"):
            precision = Precision(params=params)
            backend[params, unfused] = _backend(settings(128, **BSHD), LLAMA3_8B, phase(precision), precision, True)
    assert backend["fp32", "0"] is None and backend["fp32", "1"] == "unfused, with all scores in memory"
    assert backend["bf16", "0"] == backend["bf16", "1"] == "cuDNN's fused attention"


@pytest.mark.parametrize("scaling", ["delayed", "tensorwise"])
def test_fp8_attention_takes_no_fp32(scaling: Scaling, on_card: Any) -> None:
    on_card(card := Card((10, 0), (9, 21, 0), (13, 0)))
    taken, refused = {}, {}
    for params in ("fp32", "bf16"):
        precision = Precision(params=params, fp8="hybrid", fp8_recipe=scaling, fp8_attention=True)
        taken[params] = transformer_engine_takes(precision, 128, **BSHD)
        refused[params] = list(precision.problems(Sizes(4096, {}, {"model.hf": 128}), card))
    assert taken == {"fp32": False, "bf16": True} and not refused["bf16"]
    assert [problem.split(":")[0] for problem in refused["fp32"]] == ["`precision.params` is 'fp32'"]


@pytest.mark.parametrize("scaling", get_args(Scaling))
def test_multiples_of_tokens(scaling: Scaling) -> None:
    precision = Precision(fp8="hybrid", fp8_recipe=scaling)
    multiple = quantization.get_align_size_for_quantization(_recipe(precision))
    assert list(precision.problems(Sizes(multiple, {}, {}), None)) == []
    assert len(list(precision.problems(Sizes(multiple // 2, {}, {}), None))) == 1


@pytest.fixture(scope="module")
def groups() -> Iterator[ProcessGroupCollection]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)  # no NCCL
    yield initialize(Parallel(), seed=1)
    destroy()


DELAYED = ("precision={params: bf16, fp8: hybrid, fp8_recipe: delayed, fp8_attention: true}",)


def save(run: PhaseRun, path: Path) -> None:
    description = {"architecture": asdict(run.student), "source_hf": "", "dtype": "bf16", "step": 1}
    distributed.save(path, run.chunks, description, run.optimizer)


def test_scales_are_saved_and_loaded(tmp_path: Path, groups: ProcessGroupCollection) -> None:
    path = make_workspace(tmp_path)
    run = build_run(path, groups, *DELAYED)
    scales = sharded_scales(run.chunks)
    modules = {key.split(".scaling_")[0] for key in scales}
    assert len(modules) == 5 * run.student.num_layers  # four linear layers and the attention
    for i, scale in enumerate(scales.values()):
        scale.data.copy_(torch.rand(scale.data.shape) + i)
    save(run, tmp_path / "step-1")

    forget_models()
    resumed = build_run(path, groups, *DELAYED)
    assert all((s.data == 1).all() for k, s in sharded_scales(resumed.chunks).items() if k.endswith("scale"))
    distributed.load(tmp_path / "step-1", resumed.chunks, resumed.optimizer)
    for key, scale in sharded_scales(resumed.chunks).items():
        assert torch.equal(scale.data, scales[key].data), key
    quantizer = resumed.chunks[0].decoder.layers[0].mlp.linear_fc2.quantizers["scaling_fwd"][0]
    key = "fp8.layers.1.mlp.linear_fc2.scaling_fwd.scale"
    assert quantizer.scale == scales[key].data[0]  # what casts is what was loaded


def test_a_phase_may_begin_with_fp8(tmp_path: Path, groups: ProcessGroupCollection) -> None:
    path = make_workspace(tmp_path)
    run = build_run(path, groups, "precision.params=bf16")
    save(run, tmp_path / "step-1")
    resumed = build_run(path, groups, *DELAYED)
    distributed.load(tmp_path / "step-1", resumed.chunks, resumed.optimizer)


def test_models_are_forgotten(tmp_path: Path, groups: ProcessGroupCollection) -> None:
    run = build_run(make_workspace(tmp_path), groups, *DELAYED)
    sharded_scales(run.chunks)
    manager = quantization.FP8GlobalStateManager
    manager.add_fp8_tensors_to_global_buffer(run.chunks[0].decoder.layers[0].mlp.linear_fc1.fp8_meta)
    assert manager.quantization_state.global_amax_buffer
    forget_models()
    assert not manager.quantization_state.global_amax_buffer


@install.needs_plain_kernels
def test_a_phase_begins_without_the_models_of_the_one_before(
    tmp_path: Path, groups: ProcessGroupCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_workspace(tmp_path, precision={"params": "bf16", "fp8": "hybrid", "fp8_recipe": "delayed"})
    path.write_text(path.read_text() + "phases: [{training: {steps: 1}}, {training: {steps: 1}}]\n")
    recipe = load_recipe(path)
    phases = read_phases(recipe)
    held: list[bool] = []

    def build(*arguments: Any, real: Any = run.build) -> PhaseRun:
        held.append(bool(quantization.FP8GlobalStateManager.quantization_state.global_amax_buffer))
        return real(*arguments)

    monkeypatch.setattr(run, "build", build)
    run.train(recipe, phases, open_data(phases), groups)
    assert quantization.FP8GlobalStateManager.quantization_state.global_amax_buffer and held == [False, False]
    forget_models()


@install.needs_plain_kernels
def test_the_start_tells_the_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(make_workspace(tmp_path), ["precision.params=bf16"])
    phases = read_phases(recipe)
    train._announce(recipe, phases, open_data(phases), 1)
    assert "attention:\n  long_text, student on 1 x 256 tokens: cuDNN's fused attention\n" in capsys.readouterr().out
    monkeypatch.setattr(tex, "get_fused_attn_backend", lambda params: (tex.NVTE_Fused_Attn_Backend.NVTE_No_Backend, ""))
    with pytest.raises(UserError, match="has no fused attention here"):
        train._announce(recipe, phases, open_data(phases), 1)


def test_the_teacher_is_not_in_fp8(tmp_path: Path, groups: ProcessGroupCollection) -> None:
    path = make_workspace(tmp_path)
    for settings, teacher in (("{fp8: hybrid}", None), ("{fp8: hybrid, teacher_fp8: true}", "hybrid")):
        run = build_run(path, groups, f"precision={settings}")
        assert {chunk.config.fp8 for chunk in run.chunks} == {"hybrid"}
        [chunks] = run.train_step.teachers.models.values()
        assert {chunk.config.fp8 for chunk in chunks} == {teacher}


@install.needs_plain_kernels  # the compiled one asks cuDNN on a GPU
def test_the_backend_is_chosen_for_each_objective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ("precision={params: bf16}", "parallel.context=2", "objectives.short_restoration.whole_sequences=true")
    [phase] = read_phases(
        load_recipe(make_workspace(tmp_path), (*overrides, "objectives.long_text.mask_documents=true"))
    )
    choices = attention_choices(phase)
    assert [str(choice) for choice in choices] == [
        "long_text, student on documents of 1 x 256 tokens cut over 2 ranks: cuDNN's fused attention",
        "short_restoration, student on 8 x 16 tokens: cuDNN's fused attention",
        "short_restoration, teacher on 8 x 16 tokens: cuDNN's fused attention",
        "short_to_long, student on 4 x 64 tokens cut over 2 ranks: cuDNN's fused attention",
        "short_to_long, teacher on 4 x 64 tokens cut over 2 ranks: cuDNN's fused attention",
    ]
    assert attention_problems(choices) == []
    monkeypatch.setattr(tex, "get_fused_attn_backend", lambda params: (tex.NVTE_Fused_Attn_Backend.NVTE_No_Backend, ""))
    problems = attention_problems(attention_choices(phase))
    assert len(problems) == len(choices)
    assert problems[0].startswith("`objectives.long_text`: Transformer Engine has no fused attention here for the")
    monkeypatch.setenv("NVTE_UNFUSED_ATTN", "1")
    with pytest.raises(UserError, match="NVTE_UNFUSED_ATTN=1: only cuDNN's fused attention is used"):
        attention_choices(phase)


def test_what_is_built_cannot_take_the_unfused(tmp_path: Path, groups: ProcessGroupCollection) -> None:
    build_run(make_workspace(tmp_path), groups, "precision={params: bf16}")
    assert {name: os.environ[name] for name in ENVIRONMENT} == ENVIRONMENT
