from itertools import accumulate

from hypothesis import given, settings
from hypothesis import strategies as st

from longred_megatron.evaluation.tasks.written import most_units


@settings(deadline=None)  # of other work on the machine
@given(st.lists(st.integers(1, 50), min_size=1, max_size=300), st.integers(0, 5), st.integers(0, 2000))
def test_most_units_is_the_largest_that_fits(steps: list[int], least: int, budget: int) -> None:
    """Against counting up one by one."""
    sizes = list(accumulate(steps * (6000 // len(steps) + 1), initial=10))

    def num_tokens(units: int) -> int:
        return sizes[units]

    units = least
    while num_tokens(units + 1) <= budget:
        units += 1
    assert most_units(num_tokens, least, budget) == (units if num_tokens(least) <= budget else None)


def test_few_texts_are_written_for_a_long_prompt() -> None:
    """Each costs tokenising all of it."""
    asked: list[int] = []

    def num_tokens(units: int) -> int:
        asked.append(units)
        return 60 + 27 * units + units % 3

    assert most_units(num_tokens, 1, 131_072) == 4852
    assert len(asked) < 12
