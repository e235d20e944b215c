import pytest

from longred_megatron.config import Optimizer
from longred_megatron.training.optimizer import learning_rate


def rates(num_steps: int, **settings: object) -> list[float]:
    optimizer = Optimizer.model_validate({"lr": 1.0} | settings)
    return [learning_rate(optimizer, step, num_steps) for step in range(1, num_steps + 1)]


def test_constant_is_the_default() -> None:
    assert rates(3) == [1.0, 1.0, 1.0]


def test_warmup_is_linear_and_reaches_the_peak() -> None:
    assert rates(5, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_decay_starts_at_the_peak_and_ends_at_the_minimum(schedule: str) -> None:
    values = rates(11, schedule=schedule, warmup_steps=1, min_lr=0.1)
    assert values[0] == 1.0 and values[-1] == pytest.approx(0.1)
    assert values == sorted(values, reverse=True)
    assert values[5] == pytest.approx(0.55)  # half-way, both pass the middle
    assert (values[2] > 0.9) == (schedule == "cosine")
