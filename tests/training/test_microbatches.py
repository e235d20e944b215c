import dataclasses
import json
from collections import Counter

import pytest
import torch
from safetensors import safe_open

from longred_megatron.data.sequences import IndexedSequences, SequenceSource
from longred_megatron.errors import UserError
from longred_megatron.kernels.linear_loss import NO_LABEL
from longred_megatron.recipe import Recipe, load_recipe
from longred_megatron.training.microbatches import MicroBatch, MicroBatchSource, dump, stable_hash
from tests.recipe.conftest import LLAMA3_8B, phase_of

RECIPE = """
model: {{hf: model, rope: {{method: abf, theta: 1.0e+6}}, max_position_embeddings: 256}}
step: {{tokens_per_microbatch: 128}}
objectives:
  long_text: {{microbatches: 3, sequence_length: 128, data: long}}
  short_to_long:
    {{microbatches: 1, sequence_length: 64, data: mixed, positions: cream, weight: 10, whole_sequences: true}}
  short_restoration: {{microbatches: 2, sequence_length: 16, data: mixed, layers: [1, 2], weight: 5}}
data: {{long: {{{folder}/a: 1}}, mixed: {{{folder}/a: 0.6, {folder}/b: 0.4}}}}
optimizer: {{lr: 1.0e-3}}
training: {{steps: 4, seed: 11}}
run: {{dir: run}}
"""


@pytest.fixture
def make_recipe(tmp_path, write_indexed):
    """A function of overrides that loads the recipe above with two small sets behind it."""
    write_indexed(tmp_path / "a", [list(range(start, start + 70)) for start in range(0, 2000, 70)])
    write_indexed(tmp_path / "b", [list(range(start, start + 30)) for start in range(5000, 5600, 30)])
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(folder=tmp_path))
    return lambda *overrides: load_recipe(path, overrides)


@pytest.fixture
def recipe(make_recipe) -> Recipe:
    return make_recipe()


def source_of(recipe: Recipe) -> MicroBatchSource:
    return MicroBatchSource(phase_of(recipe, LLAMA3_8B))


def assert_same(left: MicroBatch, right: MicroBatch) -> None:
    for field in dataclasses.fields(MicroBatch):
        mine, theirs = getattr(left, field.name), getattr(right, field.name)
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs, field.name


def by_objective(batches, objective):
    return [batch for batch in batches if batch.objective == objective]


def test_a_step_holds_what_the_recipe_says(recipe):
    batches = source_of(recipe).step(1, 0, 1)
    assert [batch.index for batch in batches] == list(range(6))
    assert Counter(batch.objective for batch in batches) == {
        "long_text": 3, "short_to_long": 1, "short_restoration": 2,
    }  # fmt: skip
    assert batches[-1].objective == "long_text"  # cross-entropy last
    for batch in batches:
        settings = recipe.objectives[batch.objective]
        shape = (128 // settings.sequence_length, settings.sequence_length)
        for tensor in (batch.tokens, batch.labels, batch.student_positions):
            assert tensor.shape == shape and tensor.dtype == torch.int64 and tensor.is_contiguous()
        assert batch.settings == settings
        assert batch.num_valid_tokens == 128


def test_long_text_learns_the_next_token(recipe):
    for batch in by_objective(source_of(recipe).step(2, 0, 1), "long_text"):
        assert torch.equal(batch.labels[:, :-1], batch.tokens[:, 1:])
        assert (batch.labels != NO_LABEL).sum() == batch.num_valid_tokens
        assert torch.equal(batch.student_positions, torch.arange(128).expand(1, -1))
        assert batch.teacher_positions is None


def test_restoration_has_no_labels_and_a_teacher_at_natural_positions(recipe):
    batches = source_of(recipe).step(1, 0, 1)
    for batch in by_objective(batches, "short_restoration") + by_objective(batches, "short_to_long"):
        assert (batch.labels == NO_LABEL).all()
        assert torch.equal(batch.teacher_positions, torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens))
    for batch in by_objective(batches, "short_restoration"):
        assert torch.equal(batch.student_positions, batch.teacher_positions)
    for batch in by_objective(batches, "short_to_long"):
        assert (batch.student_positions.diff(dim=1) > 0).all()
        assert (batch.student_positions[:, -1] == 255).all()  # the last id of the target window


def test_each_objective_walks_its_own_samples_in_order(recipe):
    source = source_of(recipe)
    for objective, settings in recipe.objectives.items():
        seed = stable_hash(11, "order", objective, settings.data)
        samples = SequenceSource(IndexedSequences, recipe.data[settings.data], settings.sequence_length, seed)
        rows = [
            row
            for step in (1, 2, 3)
            for batch in by_objective(source.step(step, 0, 1), objective)
            for row in batch.tokens.tolist()
        ]
        assert len(rows) == 3 * settings.microbatches * 128 // settings.sequence_length
        assert rows == [samples[index][:-1].tolist() for index in range(len(rows))]


@pytest.mark.parametrize("num_replicas", [2, 3, 6])
def test_replicas_deal_out_the_same_step(recipe, num_replicas):
    whole = source_of(recipe).step(5, 0, 1)
    dealt = [batch for replica in range(num_replicas) for batch in source_of(recipe).step(5, replica, num_replicas)]
    for batch in dealt:
        assert_same(batch, whole[batch.index])
    assert sorted(batch.index for batch in dealt) == list(range(6))


def test_a_step_depends_on_no_step_before_and_on_no_layout(make_recipe):
    expected = source_of(make_recipe()).step(40, 0, 1)
    walked = source_of(make_recipe("training.steps=99", "parallel.tensor=2", "optimizer.lr=1.0"))
    for step in range(1, 40):
        walked.step(step, 0, 1)
    for left, right in zip(walked.step(40, 0, 1), expected, strict=True):
        assert_same(left, right)


def test_steps_seeds_and_objectives_differ(make_recipe):
    source = source_of(make_recipe())
    other = source_of(make_recipe("training.seed=12"))
    first, second, seeded = source.step(1, 0, 1), source.step(2, 0, 1), other.step(1, 0, 1)
    for left, right in zip(first + first, second + seeded, strict=True):
        assert not torch.equal(left.tokens, right.tokens)
    for left in by_objective(first, "short_to_long"):
        for right in by_objective(second + seeded, "short_to_long"):
            assert not torch.equal(left.student_positions, right.student_positions)
    # Two objectives on one data set, with sequences of one length, still read it in different orders.
    same = make_recipe("objectives.short_to_long.sequence_length=16")
    batches = source_of(same).step(1, 0, 1)
    restored, skipped = by_objective(batches, "short_restoration"), by_objective(batches, "short_to_long")
    assert not torch.equal(restored[0].tokens, skipped[0].tokens)


def test_problems_of_all_objectives_come_together(make_recipe, tmp_path):
    recipe = make_recipe(f"data.long={{{tmp_path}/none: 1}}", f"data.mixed={{{tmp_path}/nothing: 1}}")
    with pytest.raises(UserError) as raised:
        source_of(recipe)
    assert len(raised.value.problems) == 2  # two objectives share the missing `mixed`


def test_stable_hash_is_pinned():
    """A change here, or a hash that differs between processes, would change the data of runs that resume."""
    assert stable_hash(2024, "order", "long_text", "long") == 5639544925430503429
    assert 0 <= stable_hash("a", "b") < 2**63
    assert stable_hash("ab", "c") != stable_hash("a", "bc")


def test_dump_holds_every_tensor_in_training_order(recipe, tmp_path):
    batches = source_of(recipe).step(7, 1, 2)
    path = dump(batches, tmp_path / "dumps", step=7, replica=1)
    assert path == tmp_path / "dumps" / "step-00007.dp-1.safetensors"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["objectives"]) == [batch.objective for batch in batches]
        expected = {}
        for i, batch in enumerate(batches):
            for name in ("tokens", "labels", "student_positions", "teacher_positions"):
                if getattr(batch, name) is not None:
                    expected[f"{i}.{name}"] = getattr(batch, name)
        assert set(file.keys()) == set(expected)
        for name, tensor in expected.items():
            assert file.get_tensor(name).dtype == torch.int64
            assert torch.equal(file.get_tensor(name), tensor)
    assert any(batch.teacher_positions is None for batch in batches)


PACKED = "objectives.packed_distillation={microbatches: 2, sequence_length: 64, data: mixed}"


def packed_batches(make_recipe, *settings: str, step: int = 1) -> list[MicroBatch]:
    recipe = make_recipe(PACKED, *(f"objectives.packed_distillation.{setting}" for setting in settings))
    return by_objective(source_of(recipe).step(step, 0, 1), "packed_distillation")


def test_a_packed_token_asks_for_the_next_of_its_own_document(make_recipe):
    for batch in packed_batches(make_recipe, "mask_documents=true"):
        assert batch.tokens.shape == batch.labels.shape == (2, 64)
        for tokens, labels, lengths in zip(batch.tokens, batch.labels, batch.documents, strict=True):
            assert sum(lengths) == 64
            for document, wanted in zip(tokens.split(lengths), labels.split(lengths), strict=True):
                assert wanted[-1] == NO_LABEL
                assert torch.equal(wanted[:-1], document[1:]) or ((wanted == NO_LABEL).all() and not document.any())
        assert batch.num_valid_tokens == (batch.labels != NO_LABEL).sum()


def test_padding_has_no_label(make_recipe):
    """Documents of 70 and 30 tokens, cut at 64, fill few windows: what is behind them is a last document of zeros."""
    found = 0
    for batch in (
        batch for step in (1, 2, 3) for batch in packed_batches(make_recipe, "mask_documents=true", step=step)
    ):
        for tokens, labels, lengths in zip(batch.tokens, batch.labels, batch.documents, strict=True):
            if not tokens[-lengths[-1] :].any():
                found += 1
                assert (labels[-lengths[-1] :] == NO_LABEL).all()
    assert found > 3


def masked_batches(make_recipe, length: int, steps: int = 12) -> list[MicroBatch]:
    """Micro-batches of next_token in which texts do not see each other, over several epochs of the data."""
    settings = f"{{kind: next_token, microbatches: 2, sequence_length: {length}, data: mixed, mask_documents: true}}"
    source = source_of(make_recipe(f"objectives.masked={settings}"))
    return [batch for step in range(1, steps + 1) for batch in by_objective(source.step(step, 0, 1), "masked")]


def document_of(tokens: torch.Tensor) -> torch.Tensor:
    """The number of each token's document: 0 ... 2029 in documents of 70, and 5000 ... 5599 in documents of 30."""
    return torch.where(tokens < 5000, tokens // 70, 5000 + (tokens - 5000) // 30)


@pytest.mark.parametrize("length", [1, 2, 16, 64, 128])
def test_no_label_asks_for_a_token_of_another_document(make_recipe, length):
    ends = Counter()  # of documents: within a sequence, with it, and past it
    for batch in masked_batches(make_recipe, length):
        assert batch.num_valid_tokens == max(1, int((batch.labels != NO_LABEL).sum()))
        for tokens, labels, lengths in zip(batch.tokens, batch.labels, batch.documents, strict=True):
            assert sum(lengths) == length and min(lengths) >= 1
            numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
            mine = document_of(tokens)
            assert torch.equal(mine.diff() != 0, numbers.diff() != 0)
            # Tokens of a document count up: the next one of the same document is one more, in the labels as well.
            is_last = document_of(tokens + 1) != mine
            assert torch.equal(labels == NO_LABEL, is_last)
            assert torch.equal(labels[~is_last], tokens[~is_last] + 1)
            ends += Counter(within=int(is_last[:-1].sum()), past=int(not is_last[-1]), at=int(is_last[-1]))
    assert ends["past"] and (ends["within"] or length <= 2) and (ends["at"] or length > 16)


def test_a_document_as_long_as_the_sequence_asks_for_none_of_the_next(make_recipe, tmp_path, write_indexed):
    for name, first in (("a", 0), ("b", 5000)):
        write_indexed(tmp_path / name, [list(range(start, start + 16)) for start in range(first, first + 320, 16)])
    for batch in masked_batches(make_recipe, 16):
        assert [list(lengths) for lengths in batch.documents] == [[16]] * 8
        assert (batch.labels[:, -1] == NO_LABEL).all() and torch.equal(batch.labels[:, :-1], batch.tokens[:, 1:])
        assert batch.num_valid_tokens == 8 * 15


def test_a_sequence_without_a_label_still_counts_one_token(make_recipe, tmp_path, write_indexed):
    """All its texts have one token: nothing is averaged over nothing."""
    write_indexed(tmp_path / "b", [[token] for token in range(5000, 5200)])
    write_indexed(tmp_path / "a", [[token] for token in range(200)])
    for batch in masked_batches(make_recipe, 64, 2):
        assert (batch.labels == NO_LABEL).all() and batch.num_valid_tokens == 1
        assert all(lengths == [1] * 64 for lengths in map(list, batch.documents))


def test_masked_texts_are_those_of_an_unmasked_sequence(make_recipe):
    masked = masked_batches(make_recipe, 64, 3)
    plain = source_of(
        make_recipe("objectives.masked={kind: next_token, microbatches: 2, sequence_length: 64, data: mixed}")
    )
    seen = [batch for step in (1, 2, 3) for batch in by_objective(plain.step(step, 0, 1), "masked")]
    for left, right in zip(masked, seen, strict=True):
        assert torch.equal(left.tokens, right.tokens) and right.documents is None
        assert torch.equal(left.student_positions, right.student_positions)  # they run on through the sequence
        asked = left.labels != NO_LABEL
        assert torch.equal(left.labels[asked], right.labels[asked])
        assert left.num_valid_tokens < right.num_valid_tokens == 128


def test_documents_that_see_each_other_are_not_told_apart(make_recipe):
    assert all(batch.documents is None for batch in packed_batches(make_recipe))


@pytest.mark.parametrize("restart", [False, True])
def test_positions_run_through_the_pack_or_restart(make_recipe, restart):
    for batch in packed_batches(make_recipe, "mask_documents=true", f"restart_positions={str(restart).lower()}"):
        for positions, lengths in zip(batch.student_positions, batch.documents, strict=True):
            parts = [list(range(length)) for length in (lengths if restart else [64])]
            assert positions.tolist() == [position for part in parts for position in part]
        assert torch.equal(batch.student_positions, batch.teacher_positions)


def test_cross_entropy_alone_has_no_teacher(make_recipe):
    assert all(batch.teacher_positions is None for batch in packed_batches(make_recipe, "cross_entropy=1"))


def test_packs_come_one_after_the_other(make_recipe):
    rows = [row for step in (1, 2, 3) for batch in packed_batches(make_recipe, step=step) for row in batch.tokens]
    assert len({tuple(row.tolist()) for row in rows}) == len(rows) == 12


def test_the_dump_tells_documents_apart(make_recipe, tmp_path):
    batches = packed_batches(make_recipe, "mask_documents=true")
    with safe_open(dump(batches, tmp_path / "dump", step=1, replica=0), "pt") as file:
        for i, batch in enumerate(batches):
            numbers = file.get_tensor(f"{i}.documents")
            assert [torch.bincount(row).tolist() for row in numbers] == [list(lengths) for lengths in batch.documents]
            assert torch.equal(file.get_tensor(f"{i}.teacher_positions"), batch.teacher_positions)


def test_padding_fractions_are_told_by_set(make_recipe, tmp_path):
    fractions = source_of(make_recipe(PACKED)).padding_fractions()
    assert set(fractions) == {str(tmp_path / "a"), str(tmp_path / "b")}
    assert all(0 <= fraction < 0.2 for fraction in fractions.values())
