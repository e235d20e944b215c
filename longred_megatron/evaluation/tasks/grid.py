"""Which prompts are asked for: lengths, depths, independent sets, samples."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """Every task gets num_sets * len(depths) * num_samples prompts of each length.

    lengths: in tokens, what the model has to add included; depths: 0 (start) to 1 (end); num_sets: sets that
    differ in everything that is drawn; num_samples: prompts a set for every length and depth.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    num_sets: int
    num_samples: int
    seed: int

    @property
    def num_prompts_per_length(self) -> int:
        return self.num_sets * len(self.depths) * self.num_samples

    def cells(self, has_depths: bool) -> Iterator[tuple[int, float | None, int]]:
        """(set, depth, sample) of the prompts of one length. A task without depths gets as many, at depth None."""
        for prompt_set in range(self.num_sets):
            for place, depth in enumerate(self.depths):
                for sample in range(self.num_samples):
                    if has_depths:
                        yield prompt_set, depth, sample
                    else:
                        yield prompt_set, None, place * self.num_samples + sample


def even_depths(num_depths: int) -> tuple[float, ...]:
    """Depths from 0 (start) to 1 (end), evenly spaced; a single one is the middle."""
    return (0.5,) if num_depths == 1 else tuple(index / (num_depths - 1) for index in range(num_depths))


def doubling_lengths(original_window: int, extended_window: int) -> tuple[int, ...]:
    """A quarter of the original window, doubled up to the extended one, which is always the last: 512 and
    2048 give 128 ... 2048."""
    lengths = []
    length = max(original_window // 4, 1)
    while length < extended_window:
        lengths.append(length)
        length *= 2
    return (*lengths, extended_window)
