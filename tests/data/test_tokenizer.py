import hashlib
import json
import os
import shutil

import pytest
import sentencepiece

from longred_megatron.data.tokenizer import check_same_tokenizer, file_digests, load_tokenizer
from longred_megatron.errors import UserError

WHITESPACE = "  def f(x):\n\t\treturn  x\r\n\n\n   # naïve – 日本 \x00 end  \n"


@pytest.fixture(params=["sentencepiece_model", "hf_tokenizer"])
def path(request):
    return request.getfixturevalue(request.param)


def test_text_comes_back_as_it_was(path, corpus):
    tokenizer = load_tokenizer(path)
    for text in [WHITESPACE, "", " ", *corpus]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_nothing_is_added(path):
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode("return")
    assert tokenizer.end_of_document not in ids
    assert 0 <= max(ids) < tokenizer.vocab_size


def test_vocabulary_counts_added_tokens(hf_tokenizer, sentencepiece_model):
    tokenizer = load_tokenizer(hf_tokenizer)
    assert tokenizer.end_of_document == 300
    assert tokenizer.vocab_size == 301
    assert load_tokenizer(sentencepiece_model).vocab_size == 400


def test_special_tokens_may_be_added_in_front(hf_tokenizer, tmp_path):
    """A tokenizer that starts every text with a token of its own (as Llama's) must not do so here."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer.from_file(str(hf_tokenizer / "tokenizer.json"))
    inner.post_processor = processors.TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 300)])
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>").save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).encode("return") == load_tokenizer(hf_tokenizer).encode("return")


def test_digests_name_the_files(path):
    digests = file_digests(path)
    name = "tokenizer.json" if path.is_dir() else path.name
    file = path / name if path.is_dir() else path
    assert digests[name] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_no_end_of_document_is_an_error(hf_tokenizer, tmp_path, corpus):
    (tmp_path / "tokenizer.json").write_bytes((hf_tokenizer / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(UserError, match="eos_token in its tokenizer_config"):
        load_tokenizer(tmp_path)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_prefix=str(tmp_path / "endless"), vocab_size=300,
        model_type="bpe", hard_vocab_limit=False, eos_id=-1, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(UserError, match="eos_id -1"):
        load_tokenizer(tmp_path / "endless.model")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "does not exist"),
        ("tokenizer.json", "another kind of file"),
        ("broken.model", "cannot load it"),
        ("empty_folder", "cannot load it"),
    ],
)
def test_what_is_no_tokenizer_is_an_error(tmp_path, name, message):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "broken.model").write_text("nothing")
    (tmp_path / "empty_folder").mkdir()
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path / name)


def copied(folder, tmp_path, **changes):
    """A copy of a tokenizer's folder, with other keys in its tokenizer_config.json, and its file dates elsewhere."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = copy / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return copy


def test_the_same_vocabulary_passes_whatever_else_differs(hf_tokenizer, tmp_path):
    check_same_tokenizer(hf_tokenizer, hf_tokenizer)
    check_same_tokenizer(hf_tokenizer, copied(hf_tokenizer, tmp_path, model_max_length=5))
    check_same_tokenizer(hf_tokenizer, tmp_path / "none")  # nothing to compare


def test_another_entry_is_named(hf_tokenizer, tmp_path):
    copy = copied(hf_tokenizer, tmp_path)
    content = json.loads((copy / "tokenizer.json").read_text())
    content["model"]["vocab"]["!!other"] = content["model"]["vocab"].pop("!")
    (copy / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"2 entries are in one vocabulary only .*'!'"):
        check_same_tokenizer(hf_tokenizer, copy)


def test_another_end_token_is_named(hf_tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"eos_token is '<\|end\|>' and '!'"):
        check_same_tokenizer(hf_tokenizer, copied(hf_tokenizer, tmp_path, eos_token="!"))


PAYLOAD = "from pathlib import Path\nPath({marker!r}).touch()\n\n\nclass Own:\n    pass\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["payload.Own", None]}}),
        (
            "config.json",
            {"model_type": "own", "auto_map": {"AutoConfig": "payload.Own", "AutoTokenizer": "payload.Own"}},
        ),
    ],
)
def test_code_beside_a_tokenizer_is_never_run(tmp_path, monkeypatch, name, content):
    """transformers would ask, and run it for `yes |`."""
    marker = tmp_path / "it ran"
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / name).write_text(json.dumps(content))
    (folder / "payload.py").write_text(PAYLOAD.format(marker=str(marker)))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(UserError, match="cannot load it"):
        load_tokenizer(folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": "{}"},
        {"tokenizer.json": "[]"},
        {"tokenizer.json": "[" * 100_000},
        {"tokenizer.json": "{}", "tokenizer_config.json": '"text"'},
        {"tokenizer_config.json": '{"tokenizer_class": 5}'},
        {"vocab.json": "[]", "merges.txt": "\0", "tokenizer_config.json": '{"tokenizer_class": "GPT2Tokenizer"}'},
    ],
)
def test_damaged_files_are_one_message(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="transformers cannot load it"):
        load_tokenizer(tmp_path)


def damaged_copy(folder, tmp_path, **changes):
    copy = shutil.copytree(folder, tmp_path / "copy")
    content = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps(content | changes))
    return copy


def test_ids_past_32_bits_are_an_error(hf_tokenizer, tmp_path):
    model = {"type": "BPE", "vocab": {"a": 4_294_967_290}, "merges": []}
    with pytest.raises(UserError, match="its largest id is 4294967290"):
        load_tokenizer(damaged_copy(hf_tokenizer, tmp_path, model=model))


def test_a_tokenizer_is_tried_when_it_is_loaded(hf_tokenizer, tmp_path):
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "none"}
    with pytest.raises(UserError, match="fails on a text of 24 characters"):
        load_tokenizer(damaged_copy(hf_tokenizer, tmp_path, model=model))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_fifo_does_not_hold_it_up(hf_tokenizer, tmp_path, name):
    copy = shutil.copytree(hf_tokenizer, tmp_path / "copy")
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(UserError, match=f"{name} is no regular file"):
        load_tokenizer(copy)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_paths_that_cannot_be(tmp_path, name):
    with pytest.raises(UserError, match=r"^tokenizer "):
        load_tokenizer(tmp_path / name)
