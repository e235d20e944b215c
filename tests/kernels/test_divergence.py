from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

from longred_megatron.kernels.divergence import linear_distillation
from longred_megatron.kernels.top_entries import linear_top_distillation, linear_top_entries

TOKENS, WIDTH, TEACHER_WIDTH, VOCAB = 11, 6, 9, 13
SCALE = 0.37  # of the loss, as the caller's divisor and weight
DIRECTIONS = ("forward", "reverse", "jensen_shannon")


def inputs(dtype: torch.dtype, rows: int = VOCAB, tokens: int = TOKENS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, teacher_hidden, teacher_weight = (
        torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)
        for shape in ((tokens, WIDTH), (rows, WIDTH), (tokens, TEACHER_WIDTH), (rows, TEACHER_WIDTH))
    )
    weight[VOCAB:] = teacher_weight[VOCAB:] = 100  # padding that would take all the probability
    labels = torch.randint(VOCAB, (tokens,), generator=generator)
    labels[::4] = -100
    return [hidden, weight, teacher_hidden, teacher_weight, labels]


def tied_inputs(dtype: torch.dtype, rows: int) -> list[torch.Tensor]:
    """Each of the teacher's logits, exact in fp32, is there twice: at v and v + 7."""
    hidden, weight, teacher_hidden, teacher_weight, labels = inputs(dtype, rows)
    teacher_hidden, teacher_weight = (8 * teacher_hidden).round(), (64 * teacher_weight).round() / 256
    teacher_weight[7:VOCAB] = teacher_weight[: VOCAB - 7]
    return [hidden, weight, teacher_hidden, teacher_weight, labels]


def reference(
    hidden, weight, teacher_hidden, teacher_weight, labels, direction="forward", temperature=1.0, top_k=None, share=0.0
) -> list[torch.Tensor]:
    """Loss and gradients by torch's autograd in float64. Of equal teacher entries, the first are the top."""
    hidden, weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    student = hidden @ weight[:VOCAB].t()
    teacher = teacher_hidden.double() @ teacher_weight[:VOCAB].double().t()
    order = teacher.argsort(dim=1, descending=True, stable=True)
    distributions = []
    for logits in (student, teacher):
        log_p = (logits / temperature).log_softmax(1)
        if top_k is not None and top_k < VOCAB:
            top, rest = log_p.gather(1, order).split([top_k, VOCAB - top_k], 1)
            log_p = torch.cat([top, rest.logsumexp(1, keepdim=True)], 1)
        distributions.append(log_p)
    log_s, log_t = distributions
    log_m = torch.stack([log_s, log_t]).logsumexp(0) - torch.tensor(2.0, dtype=torch.float64).log()
    kl = lambda log_p, log_q: (log_p.exp() * (log_p - log_q)).sum(1)  # noqa: E731
    divergence = {
        "forward": kl(log_t, log_s),
        "reverse": kl(log_s, log_t),
        "jensen_shannon": kl(log_t, log_m) / 2 + kl(log_s, log_m) / 2,
    }[direction]
    divergence = (1 - share) * temperature**2 * divergence[labels != -100].sum()
    loss = divergence + share * F.cross_entropy(student, labels, reduction="sum", ignore_index=-100)
    (SCALE * loss).backward()
    return [loss.detach(), hidden.grad, weight.grad]


def distillation(hidden, weight, teacher_hidden, teacher_weight, labels, top_k=None, **settings) -> torch.Tensor:
    """From all entries, or from the teacher's likeliest, which are found first."""
    if top_k is None or top_k >= VOCAB:
        return linear_distillation(hidden, weight, teacher_hidden, teacher_weight, labels, vocab_size=VOCAB, **settings)
    shared = {key: settings[key] for key in ("temperature", "group", "chunk_tokens") if key in settings}
    top = linear_top_entries(teacher_hidden, teacher_weight, top_k, vocab_size=VOCAB, **shared)
    return linear_top_distillation(hidden, weight, top, labels, **settings)


def computed(hidden, weight, *others, **settings) -> list[torch.Tensor]:
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = distillation(hidden, weight, *others, **settings)
    (SCALE * loss).backward()
    return [loss.detach(), hidden.grad, weight.grad]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("share", [0, 0.3, 1])
@pytest.mark.parametrize("top_k", [None, 1, 5, VOCAB - 1, VOCAB])
@pytest.mark.parametrize("temperature", [0.5, 1, 2, 4])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_loss_and_gradients_equal_autograd(direction, temperature, top_k, share):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        tensors = inputs(dtype, rows=VOCAB + 3)
        expected = reference(*tensors, direction, temperature, top_k, share)
        settings = {"direction": direction, "temperature": temperature, "top_k": top_k, "cross_entropy": share}
        loss, grad_hidden, grad_weight = computed(*tensors, **settings, chunk_tokens=4)
        assert loss.dtype == dtype and loss.shape == ()
        for actual, wanted in zip((loss, grad_hidden, grad_weight), expected, strict=True):
            assert relative_error(actual, wanted) < tolerance
        assert not grad_hidden[tensors[-1] == -100].any() and not grad_weight[VOCAB:].any()


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("chunk_tokens", [*range(1, TOKENS + 1), 1024, None])
def test_chunks_of_any_size(chunk_tokens, top_k):
    tensors = inputs(torch.float64)
    actual = computed(*tensors, top_k=top_k, cross_entropy=0.3, chunk_tokens=chunk_tokens)
    for one, wanted in zip(actual, reference(*tensors, top_k=top_k, share=0.3), strict=True):
        assert relative_error(one, wanted) < 1e-12


@pytest.mark.parametrize("direction, top_k, share", list(product(DIRECTIONS, (None, 5), (0, 0.3))))
def test_bf16_has_fp32_arithmetic_and_returns_bf16_gradients(direction, top_k, share):
    tensors = inputs(torch.bfloat16, rows=VOCAB + 3, tokens=512)
    actual = computed(*tensors, direction=direction, top_k=top_k, cross_entropy=share, chunk_tokens=1)
    assert [one.dtype for one in actual] == [torch.float32, torch.bfloat16, torch.bfloat16]
    expected = reference(*tensors, direction, top_k=top_k, share=share)
    for one, wanted, tolerance in zip(actual, expected, (1e-3, 0.02, 0.01), strict=True):
        assert relative_error(one, wanted) < tolerance


@pytest.mark.parametrize("direction, top_k", list(product(DIRECTIONS, (None, 1, 5, VOCAB - 1))))
def test_large_logits_stay_finite(direction, top_k):
    hidden, weight, teacher_hidden, teacher_weight, labels = inputs(torch.float32, rows=VOCAB + 3)
    tensors = [3000 * hidden, weight, 3000 * teacher_hidden, teacher_weight, labels]
    assert (tensors[0] @ weight[:VOCAB].t()).abs().max() > 1e4
    loss, *gradients = computed(*tensors, direction=direction, top_k=top_k, cross_entropy=0.3)
    assert relative_error(loss, reference(*tensors, direction, top_k=top_k, share=0.3)[0]) < 1e-5
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_fewer_buckets_never_diverge_more_and_the_same_model_not_at_all(direction):
    tensors = inputs(torch.float64)
    losses = [computed(*tensors, direction=direction, top_k=k)[0] for k in range(1, VOCAB)]
    assert losses == sorted(losses) and losses[0] > 0
    for top_k in (None, 3):
        same = computed(*tensors[:2], *tensors[:2], tensors[-1], direction=direction, top_k=top_k)
        assert max(one.abs().max() for one in same) < 1e-13


def test_the_teacher_gets_no_gradient():
    tensors = inputs(torch.float32)
    for tensor in tensors[:4]:
        tensor.requires_grad_()
    distillation(*tensors, top_k=5).backward()
    assert [tensor.grad is None for tensor in tensors[:4]] == [False, False, True, True]


@pytest.mark.parametrize("top_k, share", list(product((None, 5), (0, 0.3, 1))))
def test_no_label_at_all_gives_zero_loss_and_zero_gradients(top_k, share):
    *tensors, labels = inputs(torch.float32)
    actual = computed(*tensors, torch.full_like(labels, -100), top_k=top_k, cross_entropy=share, chunk_tokens=4)
    assert not any(one.any() for one in actual)


def test_labels_matter_to_the_cross_entropy_alone_and_the_teacher_to_the_divergence_alone():
    hidden, weight, *teacher, labels = inputs(torch.float64)
    token = labels != -100
    without = computed(hidden, weight, *teacher, labels.where(~token, VOCAB + 5))
    assert all(map(torch.equal, without, computed(hidden, weight, *teacher, labels)))
    alone = computed(hidden, weight, None, None, labels, cross_entropy=1)
    assert all(map(torch.equal, alone, computed(hidden, weight, *teacher, labels, cross_entropy=1)))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"direction": "backward"}, "direction 'backward' is none of forward, reverse, jensen_shannon"),
        ({"temperature": 0}, "temperature 0 is not"),
        ({"temperature": float("nan")}, "temperature nan is not"),
        ({"cross_entropy": 1.5}, r"cross_entropy 1.5 is outside \[0, 1\]"),
        ({"cross_entropy": -1, "temperature": -1}, "temperature -1 .*; cross_entropy -1"),
        ({"chunk_tokens": 0}, "chunk_tokens 0 must be at least 1"),
        ({"vocab_size": 14}, "vocab_size 14 exceeds the 1 x 13 rows"),
        ({"labels": torch.zeros(3)}, "11 tokens have 3 labels"),
        ({"teacher_hidden": None}, "only cross_entropy 1 needs no teacher_hidden"),
        ({"teacher_hidden": torch.zeros(3, TEACHER_WIDTH)}, "student has 11 tokens, the teacher 3"),
        (
            {"teacher_weight": torch.zeros(16, TEACHER_WIDTH)},
            "student has 13 rows of the output weight, the teacher 16",
        ),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    names = ("hidden", "weight", "teacher_hidden", "teacher_weight", "labels")
    arguments = dict(zip(names, inputs(torch.float32), strict=True)) | {"vocab_size": VOCAB} | changes
    with pytest.raises(ValueError, match=message):
        linear_distillation(**arguments)


@pytest.mark.parametrize("k", [0, VOCAB])
def test_a_number_of_entries_that_says_nothing_is_refused(k):
    _, _, teacher_hidden, teacher_weight, _ = inputs(torch.float32)
    with pytest.raises(ValueError, match=f"k {k} is outside 1 to {VOCAB - 1}"):
        linear_top_entries(teacher_hidden, teacher_weight, k, vocab_size=VOCAB)


def test_entries_of_other_tokens_are_refused():
    hidden, weight, teacher_hidden, teacher_weight, labels = inputs(torch.float32)
    top = linear_top_entries(teacher_hidden[:3], teacher_weight, 5, vocab_size=VOCAB)
    with pytest.raises(ValueError, match=f"the student has {TOKENS} tokens, the teacher 3"):
        linear_top_distillation(hidden, weight, top, labels)


# Ranks, rows on each: 13 entries as 7 + 6, 8 + 5, 4 + 4 + 4 + 1, and 7 + 6 and two ranks of nothing but padding.
LAYOUTS = ((2, 7), (2, 8), (4, 4), (4, 7))
CASES = [
    (make, ranks, rows, *settings)
    for make in (inputs, tied_inputs)
    for ranks, rows in LAYOUTS
    for settings in product(DIRECTIONS, (None, 1, 5, 8, VOCAB - 1), (0, 0.3))
    if make is inputs or rows == 7  # equal entries on two ranks
]


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=4)
    groups = {2: dist.new_group([0, 1]), 4: dist.group.WORLD}
    results = []
    for make, ranks, rows, direction, top_k, share in CASES:
        if rank >= ranks:
            continue
        hidden, weight, teacher_hidden, teacher_weight, labels = make(torch.float32, rows * ranks)
        shard = slice(rank * rows, (rank + 1) * rows)
        settings = {"direction": direction, "top_k": top_k, "cross_entropy": share, "temperature": 2}
        tensors = hidden, weight[shard], teacher_hidden, teacher_weight[shard], labels
        results.append(computed(*tensors, **settings, group=groups[ranks], chunk_tokens=4))
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_ranks_with_a_shard_each_equal_one_process(tmp_path):
    mp.spawn(run_rank, args=(tmp_path,), nprocs=4)
    results = [iter(torch.load(tmp_path / f"{rank}.pt", weights_only=True)) for rank in range(4)]
    for make, ranks, rows, direction, top_k, share in CASES:
        expected = reference(*make(torch.float32, rows * ranks), direction, 2, top_k, share)
        losses, hidden_parts, weight_parts = zip(*(next(results[rank]) for rank in range(ranks)), strict=True)
        assert all(torch.equal(loss, losses[0]) for loss in losses)
        # Each rank's hidden gradient is a partial sum: the caller reduces it over the group.
        for actual, wanted in zip((losses[0], sum(hidden_parts), torch.cat(weight_parts)), expected, strict=True):
            assert relative_error(actual, wanted) < 1e-5, (make.__name__, ranks, rows, direction, top_k, share)
