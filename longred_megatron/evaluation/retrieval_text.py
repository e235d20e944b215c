"""The sentences of the key-retrieval task: one wording for training texts and for their evaluation.

A text states pass keys on lines of their own, somewhere among other lines, and ends with an open line that
asks for one of them:

    The pass key of river is lemon.
    ... other lines ...
    The pass key of river is

The right continuation is `answer(value)`, here " lemon". This is the passkey task of Mohtashami and Jaggi
(arXiv 2305.16300) with named keys, so that one text can hold several of them.
"""

import random

_WORDS = """
actor anchor angel apple april arrow autumn baker banana barn basket beach bear beard bell bench berry
bicycle bird blanket boat bone bottle bowl branch bread breeze brick bridge brother brush bucket button
cabin camel camera candle canoe captain carpet castle cattle chair cheese cherry chest chicken church
circus city clock cloud coast coffee copper corner cotton cousin cow cradle crown daisy dance daughter
desert diamond dinner doctor dog donkey dragon dream drum duck eagle earth engine evening falcon farmer
feather fence field finger fish flag flower forest fountain fox friend frog fruit garden gate ghost
giraffe glass glove goat gold grape grass guitar hammer harbor harvest hat hill honey horse hotel house
hunter island jacket jewel jungle kettle king kitchen kitten knife ladder lake lamp lawyer leaf lemon
leopard lion lizard lunch magnet maple market meadow melon milk mirror monkey moon morning mother
mountain mouse museum needle nest night nurse oak ocean olive onion orange orchard owl painter palace
panda paper parrot peach pearl pencil pepper piano pigeon pilot pirate planet plum pocket pony potato
prince pumpkin queen rabbit rain river road robin rocket rose sailor salmon school shadow sheep silver
sister snow soldier spider spoon spring squirrel station summer
"""
WORDS = tuple(_WORDS.split())


def draw_keys(num_keys: int, rng: random.Random) -> list[tuple[str, str]]:
    """(word, its pass key) for each of `num_keys`, all of them different `WORDS`.

    Pass keys are words rather than digits so that a very small model can learn to look one up: with a good
    tokenizer a word is a single token.
    """
    drawn = rng.sample(WORDS, 2 * num_keys)
    return list(zip(drawn[:num_keys], drawn[num_keys:], strict=True))


def query(word: str) -> str:
    """The open line that asks for the pass key of `word`; `answer(value)` is its right continuation."""
    return f"The pass key of {word} is"


def answer(value: str) -> str:
    """What follows `query`: the value, with the space before it."""
    return f" {value}"


def needle(word: str, value: str) -> str:
    """The line that states the pass key of `word`, newline included; it belongs at the start of a line."""
    return f"{query(word)}{answer(value)}.\n"
