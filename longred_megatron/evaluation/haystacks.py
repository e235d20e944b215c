"""Filler for prompts: every prompt has a place of its own in the texts, as far as they reach."""

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from longred_megatron.errors import UserError
from longred_megatron.evaluation.texts import MAX_CHARACTERS_PER_TOKEN, TextEncoder, TextSource

# Tokens of filler that are read at most, unless a single prompt is longer: 128 MiB of memory, and a minute or two of a
# tokenizer's time.
MOST_TOKENS = 2**25


@dataclass(frozen=True)
class Haystack:
    """The filler of one prompt. tokens: at least as many as the prompt is long, if the texts have as many."""

    tokens: Sequence[int]
    encoder: TextEncoder

    def take(self, num_tokens: int) -> list[int]:
        """The first `num_tokens` tokens. Raises `UserError` when the texts have not as many."""
        if num_tokens > len(self.tokens):
            raise UserError(
                f"texts too short: a prompt needs {num_tokens} tokens of filler, the texts give {len(self.tokens)}; "
                "give more text (--text, --long-text) or smaller --lengths"
            )
        return list(self.tokens[:num_tokens])

    def text(self, num_tokens: int) -> str:
        """The text of the first `num_tokens` tokens, a line break between documents. Raises `UserError` as `take`."""
        documents: list[list[int]] = [[]]
        for token in self.take(num_tokens):
            if (token,) == self.encoder.separator:
                documents.append([])
            else:
                documents[-1].append(token)
        return "\n".join(self.encoder.decode(document) for document in documents if document)


@dataclass(frozen=True)
class Haystacks:
    """tokens: all documents in a row, the end-of-text token between them."""

    tokens: Sequence[int]
    encoder: TextEncoder

    def num_distinct(self, length: int) -> int:
        """How many stretches of `length` tokens there are that do not overlap."""
        return len(self.tokens) // length

    def haystack(self, number: int, num_haystacks: int, length: int, rng: random.Random) -> Haystack:
        """The filler of prompt `number` among `num_haystacks` prompts of `length` tokens.

        The texts are cut into as many equal parts as there are prompts, and the haystack begins at a random
        place of its part. Texts too short for that give `num_distinct` stretches, each to several prompts.
        """
        part = len(self.tokens) // num_haystacks
        if part >= length:
            start = number * part + rng.randrange(part - length + 1)
        else:
            start = number % max(self.num_distinct(length), 1) * length
        return Haystack(self.tokens[start : start + length], self.encoder)


def read_haystacks(
    source: TextSource, encoder: TextEncoder, lengths: Sequence[int], num_haystacks: int, seed: int
) -> Haystacks:
    """Reads texts until there is an own stretch of the longest of `lengths` for each of `num_haystacks` prompts, or
    `MOST_TOKENS`, or no more text."""
    num_tokens = max(min(max(lengths) * num_haystacks, MOST_TOKENS), *lengths)
    tokens = array("i")
    with tqdm(total=num_tokens, desc="reading filler", unit="token", unit_scale=True, disable=None, leave=False) as bar:
        for text in source.documents(seed):
            room = num_tokens - len(tokens)
            new = [*encoder.encode(text[: room * MAX_CHARACTERS_PER_TOKEN]), *encoder.separator][:room]
            tokens.extend(new)
            bar.update(len(new))
            if len(tokens) >= num_tokens:
                break
    return Haystacks(tokens, encoder)
