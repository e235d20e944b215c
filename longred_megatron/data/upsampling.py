"""Long documents repeated until they are a given share of a set's tokens, as in Fu et al. (arXiv 2402.10171).

They up-sample documents of more than about 4K tokens within each source, so that the mixture of the sources stays as it
was. A set here is one source: its share in the mixture is its weight in a recipe's blend.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longred_megatron.errors import UserError

LONG_TOKENS = 4096  # Fu et al.: "about 4K"
# Up to 4 passes over the same text are nearly as good as new text (Muennighoff et al., arXiv 2305.16264).
MAX_COPIES = 4


@dataclass(frozen=True)
class LongShare:
    """What is asked for. share: of the tokens, in documents of `long_tokens` tokens or more, the tokens around a text
    counted; max_copies: how often one document may be in the set."""

    share: float
    long_tokens: int = LONG_TOKENS
    max_copies: int = MAX_COPIES

    def problems(self) -> list[str]:
        """One sentence for every setting out of its range."""
        found = [] if 0 < self.share < 1 else [f"--long-share {self.share:g}: must be between 0 and 1"]
        ranges = (("--long-tokens", self.long_tokens, 2, 2**31 - 1), ("--max-copies", self.max_copies, 1, 1000))
        return found + [
            f"{flag} {value}: must be {least} to {most:,}"
            for flag, value, least, most in ranges
            if not least <= value <= most
        ]


@dataclass(frozen=True)
class Upsampled:
    """What was done. share_before, share: of the tokens in long documents; most_copies: of one document in the set,
    the first among them; repeated_documents, repeated_tokens: written once more than they were read, or oftener."""

    long_tokens: int
    wanted_share: float
    long_documents: int
    share_before: float
    share: float
    most_copies: int
    repeated_documents: int
    repeated_tokens: int

    def summary(self) -> str:
        """One line for the user."""
        return (
            f"{self.long_documents:,} documents of {self.long_tokens:,} tokens or more: {self.share_before:.1%} of the "
            f"tokens, now {self.share:.1%}; {self.repeated_documents:,} of them are repeated, each is there at most "
            f"{self.most_copies} times"
        )


def repeats(lengths: NDArray[np.int64], wanted: LongShare) -> NDArray[np.int64]:
    """How many more times each document has to be in the set. A pure function of the arguments, in integers.

    With S tokens in short documents, long ones of L tokens need share * S / (1 - share) - L more: whole rounds of all
    long documents, and of the last round every so many tokens one, so that what is missing is less than the longest
    document. Nothing where the share is reached already.

    lengths: tokens of each document.

    Raises: `UserError` without a long document, and where `max_copies` do not reach the share.
    """
    is_long = lengths >= wanted.long_tokens
    long, total = int(lengths[is_long].sum()), int(lengths.sum())
    if long == 0:
        raise UserError(
            f"--long-share {wanted.share:g}: no document has {wanted.long_tokens} tokens or more (the longest has "
            f"{lengths.max()}); lower --long-tokens or give longer texts"
        )
    missing = round(wanted.share * (total - long) / (1 - wanted.share)) - long
    counts = np.zeros(len(lengths), dtype=np.int64)
    if missing <= 0:
        return counts
    rounds, rest = divmod(missing, long)
    if rounds + 1 + (rest > 0) > wanted.max_copies:
        most = wanted.max_copies * long
        raise UserError(
            f"--long-share {wanted.share:g}: long documents are {long / total:.1%} of the tokens, {wanted.max_copies} "
            f"copies of each make {most / (most + total - long):.1%}; lower it, raise --max-copies or give longer texts"
        )
    counts[is_long] = rounds
    # Of the last round, a document is taken when the tokens due at its end reach a token more than half of it.
    ends = np.cumsum(lengths[is_long])
    taken, due = 0, []
    for length, end in zip(lengths[is_long].tolist(), ends.tolist(), strict=True):
        take = 2 * (rest * end // long - taken) > length
        taken += length * take
        due.append(take)
    counts[is_long] += np.array(due, dtype=np.int64)
    return counts


def upsampled(lengths: NDArray[np.int64], counts: NDArray[np.int64], wanted: LongShare) -> Upsampled:
    """The account of `repeats`."""
    is_long = lengths >= wanted.long_tokens
    long, short = int(lengths[is_long].sum()), int(lengths[~is_long].sum())
    added = int((lengths * counts).sum())
    return Upsampled(
        long_tokens=wanted.long_tokens,
        wanted_share=wanted.share,
        long_documents=int(is_long.sum()),
        share_before=long / (long + short),
        share=(long + added) / (long + added + short),
        most_copies=1 + int(counts.max(initial=0)),
        repeated_documents=int((counts > 0).sum()),
        repeated_tokens=added,
    )
