"""Every study walks through its texts in several pieces, as it does with long ones."""

import pytest

from longred_megatron.analysis import walk


@pytest.fixture(autouse=True)
def small_pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 7 tokens: the last piece is a shorter one for most lengths. Not where pieces are what a test is about."""
    if request.module.__name__.rpartition(".")[2] in ("test_studies", "test_layer_choice"):
        monkeypatch.setattr(walk, "PIECE_TOKENS", 7)
