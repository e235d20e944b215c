"""Entries drawn from a teacher: as often as they are likely, and on average the divergence and its gradient."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from longred_megatron.kernels.divergence import linear_distillation
from longred_megatron.kernels.drawn_entries import linear_drawn_distillation, linear_drawn_entries
from longred_megatron.kernels.top_entries import Entries, linear_top_entries

TOKENS, WIDTH, VOCAB = 6, 8, 13
LABELS = torch.tensor([1, -100, 3, 4, 5, 6])


def models(rows: int = VOCAB, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """hidden and weight of a student, and of a teacher; rows from VOCAB on are padding."""
    generator = torch.Generator().manual_seed(5)
    shapes = ((TOKENS, WIDTH), (rows, WIDTH), (TOKENS, WIDTH), (rows, WIDTH))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def uniforms(draws: int, seed: int = 1) -> Tensor:
    return torch.rand(TOKENS, draws, generator=torch.Generator().manual_seed(seed))


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def test_they_come_as_often_as_they_are_likely() -> None:
    _, _, hidden, weight = models(VOCAB + 3)
    draws = 40_000
    found = linear_drawn_entries(hidden, weight, uniforms(draws), vocab_size=VOCAB, temperature=2.0, chunk_tokens=4)
    likely = (hidden @ weight[:VOCAB].t() / 2).softmax(-1)
    often = torch.nn.functional.one_hot(found.entries.long(), VOCAB).double().mean(1)
    assert ((often - likely).abs() < 5 * (likely * (1 - likely) / draws).sqrt() + 1e-9).all()
    torch.testing.assert_close(found.log_probabilities, likely.log().gather(1, found.entries.long()))
    assert found.entries.dtype == torch.int32


def test_the_ends_of_the_unit_interval_are_entries() -> None:
    _, _, hidden, weight = models(VOCAB + 3, torch.float32)
    ends = torch.tensor([0.0, 1 - 2**-24]).expand(TOKENS, 2)
    found = linear_drawn_entries(hidden, weight, ends, vocab_size=VOCAB)
    assert (found.entries[:, 0] == 0).all() and (found.entries[:, 1] < VOCAB).all()
    assert found.log_probabilities.isfinite().all()


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_on_average_they_give_the_divergence_and_its_gradients(share: float) -> None:
    hidden, weight, *teacher = models()
    hidden.requires_grad_(), weight.requires_grad_()
    settings = {"temperature": 2.0, "cross_entropy": share}
    exact = gradients(
        linear_distillation(hidden, weight, *teacher, LABELS, vocab_size=VOCAB, **settings), hidden, weight
    )
    found = []
    for seed in range(40):
        drawn = linear_drawn_entries(*teacher, uniforms(500, seed), vocab_size=VOCAB, temperature=2.0)
        loss = linear_drawn_distillation(hidden, weight, drawn, LABELS, chunk_tokens=4, **settings)
        found.append(gradients(loss, hidden, weight))
    for estimates, wanted in zip(zip(*found, strict=True), exact, strict=True):
        each = torch.stack(estimates)
        error = each.std(0) / len(found) ** 0.5
        assert ((each.mean(0) - wanted).abs() < 5 * error + 1e-9).all()


def test_the_gradient_is_that_of_the_estimate() -> None:
    hidden, weight, *teacher = models()
    drawn = linear_drawn_entries(*teacher, uniforms(5), vocab_size=VOCAB, temperature=2.0)
    hidden.requires_grad_(), weight.requires_grad_()
    ours = gradients(
        linear_drawn_distillation(hidden, weight, drawn, LABELS, temperature=2.0, chunk_tokens=4), hidden, weight
    )
    log_s = (hidden @ weight.t() / 2).log_softmax(-1).gather(1, drawn.entries.long())
    plain = 4 * ((drawn.log_probabilities - log_s).mean(1) * (LABELS != -100)).sum()
    for a, b in zip(ours, gradients(plain, hidden, weight), strict=True):
        torch.testing.assert_close(a, b)


def test_wrong_numbers_of_tokens_are_refused() -> None:
    hidden, weight, *teacher = models()
    with pytest.raises(ValueError, match="6 tokens have 3 rows of uniform numbers"):
        linear_drawn_entries(*teacher, uniforms(5)[:3], vocab_size=VOCAB)
    drawn = linear_drawn_entries(teacher[0][:3], teacher[1], uniforms(5)[:3], vocab_size=VOCAB)
    with pytest.raises(ValueError, match="the student has 6 tokens, the teacher 3"):
        linear_drawn_distillation(hidden, weight, drawn, LABELS)


def run_rank(rank: int, folder: Path, rows: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=3)
    hidden, weight, teacher_hidden, teacher_weight = models(3 * rows)
    shard, group = slice(rank * rows, (rank + 1) * rows), dist.group.WORLD
    drawn = linear_drawn_entries(teacher_hidden, teacher_weight[shard], uniforms(50), vocab_size=VOCAB, group=group)
    own = weight[shard].clone().requires_grad_()
    hidden.requires_grad_()
    loss = linear_drawn_distillation(hidden, own, drawn, LABELS, group=group, chunk_tokens=4)
    torch.save([*drawn[:2], *gradients(loss, hidden, own)], folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("rows", [5, 7])  # of 13 entries: 5 + 5 + 3, and 7 + 6 + nothing but padding
def test_ranks_with_a_shard_each_equal_one_process(rows: int, tmp_path: Path) -> None:
    mp.spawn(run_rank, args=(tmp_path, rows), nprocs=3)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    hidden, weight, *teacher = models(3 * rows)
    drawn = linear_drawn_entries(*teacher, uniforms(50), vocab_size=VOCAB)
    hidden.requires_grad_(), weight.requires_grad_()
    expected = gradients(linear_drawn_distillation(hidden, weight, drawn, LABELS), hidden, weight)
    for entries, log_probabilities, loss, *_ in found:
        assert torch.equal(entries, drawn.entries)
        torch.testing.assert_close(log_probabilities, drawn.log_probabilities)
        torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(sum(each[3] for each in found), expected[1])
    torch.testing.assert_close(torch.cat([each[4] for each in found]), expected[2])


def test_entries_and_log_probabilities_are_one_tensor_bit_for_bit() -> None:
    _, _, hidden, weight = models(dtype=torch.float32)
    likeliest = linear_top_entries(hidden, weight, 4, vocab_size=VOCAB)
    for found, number in ((likeliest, 4), (linear_drawn_entries(hidden, weight, uniforms(5), vocab_size=VOCAB), 5)):
        again = Entries.unpacked(found.packed(), number, VOCAB)
        assert torch.equal(again.entries, found.entries)
        assert torch.equal(again.log_probabilities, found.log_probabilities)
