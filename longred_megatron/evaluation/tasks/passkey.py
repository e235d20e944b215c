"""Pass-key retrieval: keys stand in filler, and the value of one of them is asked for."""

from longred_megatron.evaluation import retrieval_text
from longred_megatron.evaluation.tasks.base import Continuation, Place, Prompt
from longred_megatron.evaluation.texts import TextEncoder

# Of 200 words a long text may hold nearly all; a value that the filler has no second time is looked for this often.
MOST_DRAWS = 100


class Passkey(Continuation):
    """One key in the filler, at the depth asked for. A prompt has exactly the length asked for, answer included.

    The value asked for stands in the prompt once: one that the filler or another key holds is drawn again, up
    to `MOST_DRAWS` times.
    """

    name = "passkey"
    title = "Passkey (1 key)"
    num_keys = 1  # in a prompt, the one asked for among them

    def room_needed(self) -> str:
        return "1 key and the question" if self.num_keys == 1 else f"{self.num_keys} keys and the question"

    def facts(self) -> dict[str, int | str]:
        return {"num_keys": self.num_keys}

    def prompt(self, place: Place) -> Prompt | None:
        for _ in range(MOST_DRAWS):
            pairs = retrieval_text.draw_keys(self.num_keys, place.rng)
            # Keys and question open a line of their own wherever the filler is cut, so each brings the newline
            # before it.
            keys = [place.encoder.encode("\n" + retrieval_text.needle(*pair)) for pair in pairs]
            question, answer = question_and_answer(place.encoder, *pairs[0])
            fixed = len(place.encoder.start) + sum(map(len, keys)) + len(question) + len(answer)
            if fixed > place.length:
                return None
            filler = place.haystack.take(place.length - fixed)
            if pairs[0][1] not in place.encoder.decode(filler):
                break
        tokens = [*place.encoder.start, *_hidden(keys, filler, place), *question]
        return place.prompt(tokens, [pairs[0][1]], answer)


def _hidden(keys: list[list[int]], filler: list[int], place: Place) -> list[int]:
    """The filler with the keys in it: the first after round(depth * filler tokens) of it, the others anywhere."""
    assert place.depth is not None
    spots = [round(place.depth * len(filler)), *(place.rng.randint(0, len(filler)) for _ in keys[1:])]
    tokens: list[int] = []
    taken = 0
    for spot, key in sorted(zip(spots, keys, strict=True), key=lambda pair: pair[0]):
        tokens += [*filler[taken:spot], *key]
        taken = spot
    return tokens + filler[taken:]


def question_and_answer(encoder: TextEncoder, word: str, value: str) -> tuple[list[int], list[int]]:
    """Tokens of the question and of its answer, tokenised together and parted where the question alone begins
    to differ.

    So a tokenizer that joins the end of the question with the answer's start is asked to complete its own
    tokens.
    """
    asked = "\n" + retrieval_text.query(word)
    alone, together = encoder.encode(asked), encoder.encode(asked + retrieval_text.answer(value))
    common = 0
    while common < min(len(alone), len(together)) and alone[common] == together[common]:
        common += 1
    return together[:common], together[common:]
