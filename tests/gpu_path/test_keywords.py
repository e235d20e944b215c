"""Every keyword and import that Megatron and the project hand to Transformer Engine is there: an upgrade shows."""

from tests.gpu_path import install

# isort: split

import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest
from transformer_engine.pytorch import DotProductAttention, Linear

import longred_megatron
from tests.gpu_path.compiled import NAME, enums, functions
from tests.gpu_path.handed import Handed, keywords, missing_imports, tree_of, unknown

MEGATRON = (
    "megatron.core.extensions.transformer_engine",
    "megatron.core.fp8_utils",
    "megatron.core.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.optimizer",
    "megatron.core.tensor_parallel.random",
    "megatron.core.models.common.embeddings.rope_utils",
    "megatron.core.transformer.transformer_block",
    "megatron.core.transformer.transformer_layer",
    "megatron.core.transformer.attention",
)
# What Megatron has for older versions of Transformer Engine and, told the installed one, does not reach.
OLD_IMPORTS = {
    Handed("transformer_engine.pytorch.attention", "_SplitAlongDim"),
    Handed("transformer_engine.pytorch.attention", "apply_rotary_pos_emb"),
    Handed("transformer_engine.pytorch.cpp_extensions", "cast_to_fp8"),
    Handed("transformer_engine.pytorch.module.base", "get_workspace"),
}
OLD_KEYWORDS = {
    Handed(f"{module}.__init__", f"ub_{how}_{what}")
    for module, what in (("Linear", "ag"), ("Linear", "rs"), ("LayerNormLinear", "ag"))
    for how in ("split", "atomic_gemm")
} | {Handed("general_gemm", "workspace")}


@pytest.fixture(scope="module")
def modules() -> list[ModuleType]:
    project = [each.name for each in pkgutil.walk_packages(longred_megatron.__path__, "longred_megatron.")]
    return [importlib.import_module(name) for name in (*MEGATRON, *project)]


def test_imports_are_there(modules: list[ModuleType]) -> None:
    assert {name for module in modules for name in missing_imports(tree_of(module))} == OLD_IMPORTS


def unknown_keywords(modules: list[ModuleType]) -> set[Handed]:
    handed = [each for module in modules for each in keywords(module, tree_of(module))]
    assert len(handed) > 200, "the walk over the sources has lost its way"
    return {Handed(function.__qualname__, keyword) for function, keyword in handed if unknown(function, keyword)}


def test_keywords_are_taken(modules: list[ModuleType]) -> None:
    assert unknown_keywords(modules) == OLD_KEYWORDS


@pytest.mark.parametrize(
    ("owner", "method", "keyword"),
    [
        (DotProductAttention, "__init__", "num_gqa_groups"),  # Megatron hands it in the call
        (Linear, "__init__", "ub_overlap_ag"),  # Megatron collects it in a dictionary before
        (DotProductAttention, "forward", "max_seqlen_kv"),  # the project hands it
    ],
)
def test_a_dropped_keyword_is_seen(
    modules: list[ModuleType], monkeypatch: pytest.MonkeyPatch, owner: type, method: str, keyword: str
) -> None:
    function = getattr(owner, method)
    kept = [p for name, p in inspect.signature(function).parameters.items() if name != keyword]
    monkeypatch.setattr(function, "__signature__", inspect.Signature(kept), raising=False)
    assert unknown_keywords(modules) - OLD_KEYWORDS == {Handed(f"{owner.__name__}.{method}", keyword)}


@pytest.mark.skipif(not install.COMPILED, reason="needs the compiled Transformer Engine (make gpu-check)")
def test_the_compiled_module_has_what_its_stand_in_has() -> None:
    compiled = importlib.import_module(NAME)
    assert {name for name in functions() if not hasattr(compiled, name)} == set()
    for name, enum in enums().items():
        assert set(enum.__members__) <= set(getattr(compiled, name).__members__), name
