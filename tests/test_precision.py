import pytest

from longred_megatron.precision import BLACKWELL, HOPPER, Card, Precision, Sizes

ADA = Card((8, 9), (9, 20, 0), (13, 0))
SIZES = Sizes(rank_tokens=8192, widths={"hidden_size is": 4096}, head_dims={"model.hf": 128})
HALF_HEADS = Sizes(8192, {}, {"model.hf": 64})


def problems(card: Card | None = None, sizes: Sizes = SIZES, /, **settings: object) -> list[str]:
    return list(Precision.model_validate({"fp8": "hybrid"} | settings).problems(sizes, card))


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        ({}, None),
        ({"fp8": None, "fp8_attention": False}, None),  # as recipes of earlier versions have it
        ({"fp8": "hybrid", "fp8_attention": False}, "tensorwise"),
        ({"fp8": "hybrid", "fp8_attention": True}, "delayed"),
        ({"fp8": "e4m3", "fp8_recipe": "blockwise"}, "blockwise"),
    ],
)
def test_scaling(settings: dict[str, object], scaling: str | None) -> None:
    assert Precision.model_validate(settings).scaling == scaling


def test_a_teacher_has_no_fp8_unless_asked() -> None:
    assert Precision(fp8="hybrid").of_teacher() == Precision()
    both = Precision(fp8="hybrid", teacher_fp8=True)
    assert both.of_teacher() is both


@pytest.mark.parametrize("settings", [{}, {"fp8_recipe": "delayed"}, {"fp8_recipe": "blockwise"}, {"fp8": "e4m3"}])
def test_products_without_problem(settings: dict[str, object]) -> None:
    assert problems(HOPPER, **settings) == problems(**settings) == []


def test_attention_without_problem() -> None:
    assert problems(HOPPER, fp8_attention=True) == []
    assert problems(BLACKWELL, HALF_HEADS, fp8_attention=True) == []
    for scaling in ("tensorwise", "mxfp8"):
        assert problems(BLACKWELL, fp8_attention=True, fp8_recipe=scaling) == []
        assert problems(fp8_attention=True, fp8_recipe=scaling) == []  # no card is known: it is taken to be Blackwell


@pytest.mark.parametrize(
    ("card", "settings", "expected"),
    [
        (None, {"fp8": None, "fp8_recipe": "tensorwise"}, "`precision.fp8_recipe` is 'tensorwise': has no effect"),
        (None, {"fp8": None, "fp8_attention": True}, "`precision.fp8_attention` is true: has no effect"),
        (None, {"fp8": None, "teacher_fp8": True}, "`precision.teacher_fp8` is true: has no effect"),
        (None, {"params": "fp32"}, "`precision.params` is 'fp32': FP8 products and attention take bf16"),
        (None, {"fp8_recipe": "delayed", "teacher_fp8": True}, "`precision.teacher_fp8` is true: with delayed"),
        (Card((8, 0), (9, 20, 0), (13, 0)), {}, "`precision.fp8` is 'hybrid': needs 8.9 or newer"),
        (HOPPER, {"fp8_recipe": "mxfp8"}, "`precision.fp8_recipe` mxfp8 needs Blackwell"),
        (ADA, {"fp8_recipe": "blockwise"}, "`precision.fp8_recipe` blockwise needs Hopper"),
        (None, {"fp8_recipe": "blockwise", "fp8_attention": True}, "`precision.fp8_attention` is true: there is none"),
        (ADA, {"fp8_attention": True}, "`precision.fp8_attention` is true: is for Hopper"),
        (
            HOPPER,
            {"fp8_recipe": "tensorwise", "fp8_attention": True},
            "`precision.fp8_attention` is true: tensorwise scaling needs Blackwell",
        ),
        (
            Card((10, 0), (9, 20, 0), (13, 0)),
            {"fp8_recipe": "mxfp8", "fp8_attention": True},
            "`precision.fp8_attention` is true: with mxfp8 it needs cuDNN 9.21",
        ),
        (
            Card((10, 0), (9, 13, 0), (13, 0)),
            {"fp8_recipe": "tensorwise", "fp8_attention": True},
            "`precision.fp8_attention` is true: with tensorwise scaling it needs a newer cuDNN than 9.13.0",
        ),
    ],
)
def test_problem(card: Card | None, settings: dict[str, object], expected: str) -> None:
    found = problems(card, **settings)
    assert found and found[0].startswith(expected), found
    assert len(found) == 1 or "mxfp8" not in settings.values()


@pytest.mark.parametrize(
    ("sizes", "scaling", "expected"),
    [
        (Sizes(8200, {}, {}), "tensorwise", "a rank holds 8200 tokens of a micro-batch, and FP8"),
        (Sizes(8208, {}, {}), "mxfp8", "a rank holds 8208 tokens of a micro-batch, and FP8"),
        (Sizes(8192, {"intermediate_size is": 680}, {}), "tensorwise", "intermediate_size is 680 on a rank"),
    ],
)
def test_sizes_that_no_product_takes(sizes: Sizes, scaling: str, expected: str) -> None:
    [found] = problems(None, sizes, fp8_recipe=scaling)
    assert expected in found


@pytest.mark.parametrize(
    ("head_dim", "card"), [(64, None), (96, HOPPER), (256, HOPPER), (256, BLACKWELL), (72, BLACKWELL)]
)
def test_head_dims_that_no_attention_takes(head_dim: int, card: Card | None) -> None:
    [found] = problems(card, Sizes(8192, {}, {"model.hf": head_dim}), fp8_attention=True)
    assert f"{head_dim}" in found and "heads must have" in found
    assert problems(card, Sizes(8192, {}, {"model.hf": head_dim})) == []


def test_megatron_hears_of_all_of_it() -> None:
    assert Precision().megatron_settings() == {}
    settings = Precision(fp8="hybrid", fp8_attention=True).megatron_settings()
    assert settings["fp8_recipe"] == "delayed" and settings["fp8_dot_product_attention"]
    assert settings["fp8_amax_history_len"] > 1
