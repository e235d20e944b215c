"""Tasks written as text: how long their prompts get, and the chat template around them."""

import re
import shutil
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longred_megatron.errors import UserError
from longred_megatron.evaluation.evaluate import write_prompt_file
from longred_megatron.evaluation.haystacks import Haystacks
from longred_megatron.evaluation.settings import Settings
from longred_megatron.evaluation.tasks import chosen_tasks
from longred_megatron.evaluation.tasks.base import Options
from longred_megatron.evaluation.tasks.grid import Grid
from longred_megatron.evaluation.tasks.written import most_units
from longred_megatron.evaluation.texts import encoder_of
from tests.evaluation.conftest import byte_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


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


def test_a_chat_template_stands_around_the_question_and_before_the_answer_prefix() -> None:
    tokenizer = byte_tokenizer(bos=True)
    tokenizer.chat_template = TEMPLATE
    encoder = encoder_of(tokenizer)
    haystacks = Haystacks(encoder.encode("The boat was late. Nobody had seen it! " * 400), encoder)
    grid = Grid((8_000,), (0.5,), 1, 1, 5)
    plain, _ = chosen_tasks(["ruler", "nonliteral"], Options())
    chat, _ = chosen_tasks(["ruler", "nonliteral"], Options(chat_template=True))
    assert len(chat) == 12 and {task.facts()["template"] for task in chat} == {"chat"}
    for without, with_template in zip(plain, chat, strict=True):
        [bare], [asked] = (task.prompts(encoder, haystacks, grid) for task in (without, with_template))
        chat_text = encoder.decode(list(asked.tokens))
        [(message, reply)] = re.findall(r"<bos>\[user\] (.*)<eos>\[assistant\]( .*)", chat_text, re.DOTALL)
        assert list(asked.tokens[: -len(reply)]) == tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], add_generation_prompt=True, return_dict=False
        )  # the special tokens are tokens
        bare_text = encoder.decode(list(bare.tokens[1:]))
        assert bare_text.endswith(reply) and asked.expected == bare.expected
        question = bare_text.removesuffix(reply).rpartition("\n")[2]
        assert message[:40] == bare_text[:40] and message.endswith(question)
        assert with_template.num_row_tokens(asked) <= 8_000
        assert len(asked.tokens) > 7_000  # filled


def test_the_first_of_models_with_one_tokenizer_gives_the_template(
    folders: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    instructed = shutil.copytree(folders["base"], tmp_path / "instructed")
    (instructed / "chat_template.jinja").write_text(TEMPLATE)
    settings = Settings((text_file,), (text_file,), tasks=("nonliteral",), lengths=(512,), chat_template=True)
    assert write_prompt_file([instructed, folders["longer"]], tmp_path / "prompts.jsonl", settings=settings)
    with pytest.raises(UserError, match="longer has none"):
        write_prompt_file([folders["longer"], instructed], tmp_path / "others.jsonl", settings=settings)


def test_what_a_chat_template_lacks_is_one_message() -> None:
    with pytest.raises(UserError, match="--chat-template: none of --tasks passkey is written as a message"):
        chosen_tasks(["passkey"], Options(chat_template=True))
    encoder = encoder_of(byte_tokenizer())
    with pytest.raises(UserError, match="has none; leave the flag out"):
        encoder.chat("Who?", " It was")
    encoder.tokenizer.chat_template = "{{ raise_exception('a system message\nmust come first') }}"
    with pytest.raises(UserError, match="a system message must come first"):
        encoder.chat("Who?", " It was")
