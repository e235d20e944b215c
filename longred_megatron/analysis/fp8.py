"""Loss, hidden states and gradients with emulated FP8 against the model in bf16, by length of the text."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import Tensor
from tqdm import tqdm

from longred_megatron.analysis.emulated_fp8 import Emulator, linear_layers
from longred_megatron.analysis.measure import Ranks
from longred_megatron.analysis.page import Study
from longred_megatron.checkpoint.causal_model import load_causal_model
from longred_megatron.data.sequences import IndexedSequences, check_tokens
from longred_megatron.errors import UserError
from longred_megatron.evaluation.models import CHUNK_TOKENS, head_is_plain, read_facts, resolve_device
from longred_megatron.evaluation.report import check_output
from longred_megatron.evaluation.texts import cut_windows, load_encoder, text_source
from longred_megatron.families import read_architecture
from longred_megatron.page import MARKERS, MODEL_COLOURS, STYLE, Plot, svg_of
from longred_megatron.precision import Scaling

KIND = "longred-megatron study of emulated FP8"
WITH_ATTENTION = "+attention"
RECIPES = (*get_args(Scaling), f"delayed{WITH_ATTENTION}")
NOTE = (
    "Emulated: casts to E4M3, of gradients to E5M2, in the linear layers (+attention: in the attention core too), "
    "sums in fp32. Not seen: the hardware's shorter sums"
)
CAPTIONS = {
    "loss": "What a recipe's casts cost on these texts. Take one whose line stays flat up to the length you train at.",
    "hidden": "How far the last layer moves. If it grows with the length, compare the loss above before you train so.",
    "gradient": "How far the step that training takes is off. Noise of some percent averages out over a batch; a line "
    "that grows with the length does not.",
}
TITLES = {
    "loss": "loss above bf16, nats a token (emulated FP8)",
    "hidden": "last layer: |h - h bf16| / |h bf16| (emulated FP8)",
    "gradient": "weights' gradient: |g - g bf16| / |g bf16| (emulated FP8)",
}


@dataclass(frozen=True)
class Gap:
    """Of one FP8 recipe at one length, over its windows; loss in nats a token.

    hidden: |h - h_bf16| / |h_bf16|, Frobenius norms over all tokens, of each layer's output from 1 on. gradient: the
    same of the loss's gradient by the weights of all linear layers, a window at a time; None with --forward-only.
    """

    recipe: str
    length: int
    num_windows: int
    loss_bf16: float
    loss: float
    hidden: tuple[float, ...]
    gradient: float | None

    @property
    def loss_gap(self) -> float:
        return self.loss - self.loss_bf16


def add_arguments(parser: ArgumentParser) -> None:
    """The flags of `tools/analyze.py fp8`."""
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="Hugging Face folder of the model")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder for results.json and the page"
    )
    parser.add_argument(
        "--text", nargs="*", default=[], metavar="PATH",
        help="text files or folders, or one prefix of tools/prepare_data.py; none: Python's standard library",
    )  # fmt: skip
    parser.add_argument(
        "--lengths", nargs="+", default=[512, 2048], **number, help="first tokens of a window (%(default)s)"
    )
    parser.add_argument("--windows", default=2, **number, help="windows, of the longest length (%(default)s)")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="default: all of them")
    parser.add_argument(
        "--forward-only", action="store_true", help="no gradients, which take several times the memory and time"
    )
    parser.add_argument("--seed", default=2024, **number, help="choice of the windows (%(default)s)")


def study(options: Namespace, ranks: Ranks) -> Study:
    """Measures every recipe at every length, a window at a time.

    Raises:
        UserError: no model, no text, a length that is none, an output that holds something else, or several processes.
    """
    if ranks.size > 1:
        raise UserError(
            "the study fp8 runs on one process, since delayed scales remember the windows before; start it without "
            "torchrun"
        )
    for key, values in (("lengths", options.lengths), ("windows", [options.windows])):
        if wrong := [value for value in values if not (2 if key == "lengths" else 1) <= value <= 2**20]:
            raise UserError(f"--{key} {wrong[0]}: must be {2 if key == 'lengths' else 1} to {2**20:,}")
    read_facts(options.hf)
    read_architecture(options.hf)  # refuses what the emulation does not know, as sliding windows
    check_output(options.output, KIND)
    lengths = sorted(set(options.lengths))
    tokens = _windows(options, lengths[-1])
    device = resolve_device("auto")
    network = load_causal_model(options.hf, torch.bfloat16).to(device).requires_grad_(False)
    if not options.forward_only:
        for module in linear_layers(network):
            module.weight.requires_grad_()
    if not head_is_plain(network, device):
        raise UserError(f"{options.hf}: its logits are not its head on the last hidden states; not supported here")
    bar = tqdm(total=(1 + len(options.recipes)) * len(tokens) * len(lengths), unit="pass", disable=None)
    gaps = [gap for length in lengths for gap in _gaps(network, tokens[:, :length], options.recipes, bar)]
    bar.close()
    return Study(
        KIND,
        f"FP8, emulated: {options.hf.name}",
        [NOTE + ".", f"Model {options.hf}, weights and all else in bf16; the same windows for every recipe."],
        _table(gaps),
        [_figure(gaps, what) for what in list(TITLES)[: 2 if options.forward_only else 3]],
        {"emulated": NOTE, "hf": str(options.hf), "gaps": [asdict(gap) | {"loss_gap": gap.loss_gap} for gap in gaps]},
        tokens,
    )


def _windows(options: Namespace, length: int) -> Tensor:
    """[windows, length] tokens."""
    prefix = options.text[0] if len(options.text) == 1 else ""
    if prefix and Path(f"{prefix}.idx").is_file():
        check_tokens(prefix, read_architecture(options.hf).vocab_size)
        sequences = IndexedSequences(prefix, length - 1, (options.seed,))
        return torch.stack([torch.from_numpy(sequences[i]) for i in range(options.windows)])
    source = text_source([Path(path) for path in options.text])
    return cut_windows(source, load_encoder(options.hf), length, options.windows, options.seed).tokens


def _gaps(network: Any, tokens: Tensor, recipes: Sequence[str], bar: Any) -> list[Gap]:
    """The gaps of all recipes at one length; the values of two passes of one window exist at a time."""
    (count, length), layers = tokens.shape, network.config.num_hidden_layers
    emulators = {recipe: _emulator(network, recipe) for recipe in recipes}
    losses = dict.fromkeys(("bf16", *recipes), 0.0)
    errors, sizes = {recipe: torch.zeros(()) for recipe in recipes}, torch.zeros(())
    for window in tokens.split(1):
        plain, loss = _pass(network, window)
        losses["bf16"] += loss / count
        sizes = sizes + _squares(plain)
        bar.update()
        for recipe, emulator in emulators.items():
            with emulator.on():
                values, loss = _pass(network, window)
            losses[recipe] += loss / count
            errors[recipe] = errors[recipe] + _squares(a.float() - b for a, b in zip(values, plain, strict=True))
            bar.update()
    gaps = []
    for recipe in recipes:
        hidden = (errors[recipe] / sizes)[:layers].sqrt().tolist()
        weights = errors[recipe][layers:].sum() / sizes[layers:].sum()
        gradient = weights.sqrt().item() if len(sizes) > layers else None
        gaps.append(Gap(recipe, length, count, losses["bf16"], losses[recipe], tuple(hidden), gradient))
    return gaps


def _squares(values: Iterable[Tensor]) -> Tensor:
    """[values], sums of squares."""
    return torch.tensor([x.float().square().sum().item() for x in values], dtype=torch.float64)


def _emulator(network: Any, recipe: str) -> Emulator:
    scaling: Any = recipe.removesuffix(WITH_ATTENTION)
    return Emulator(network, scaling, attention=recipe.endswith(WITH_ATTENTION))


def _pass(network: Any, window: Tensor) -> tuple[list[Tensor], float]:
    """Each layer's output (the last one's after the final norm), then the gradient of each weight that takes one; and
    the mean next-token loss of one window.

    One pass, so that delayed scales see each window once; logits exist for some positions at a time.
    """
    window, head = window.to(network.device), network.get_output_embeddings()
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    with torch.set_grad_enabled(bool(weights)):
        base = network.base_model(input_ids=window, use_cache=False, output_hidden_states=True)
        last, total = base.last_hidden_state.detach().requires_grad_(bool(weights)), 0.0
        pairs = zip(last[0, :-1].split(CHUNK_TOKENS), window[0, 1:].split(CHUNK_TOKENS), strict=True)
        for hidden, labels in pairs:
            loss = F.cross_entropy(head(hidden).float(), labels, reduction="sum") / (window.shape[1] - 1)
            total += loss.item()
            if weights:
                loss.backward()
        gradients = torch.autograd.grad(base.last_hidden_state, weights, last.grad) if weights else ()
    return [*(state.detach() for state in base.hidden_states[1:]), *gradients], total


def _table(gaps: Sequence[Gap]) -> list[list[str]]:
    rows = [
        [
            "recipe",
            "tokens",
            "windows",
            "loss bf16",
            "emulated",
            "gap",
            "last layer's gap",
            "largest gap",
            "gradient's gap",
        ]
    ]
    for gap in gaps:
        losses = [f"{gap.loss_bf16:.4f}", f"{gap.loss:.4f}", f"{gap.loss_gap:+.4f}"]
        hidden = [f"{gap.hidden[-1]:.4f}", f"{max(gap.hidden):.4f}"]
        hidden.append("" if gap.gradient is None else f"{gap.gradient:.4f}")
        rows.append([gap.recipe, f"{gap.length:,}", str(gap.num_windows), *losses, *hidden])
    return rows


def _figure(gaps: Sequence[Gap], what: str) -> Plot:
    """The gap in the loss, of the last layer's hidden states, or of gradients, over the length of the text."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 3.6), layout="constrained")
        axes = figure.subplots()
        for order, recipe in enumerate(dict.fromkeys(gap.recipe for gap in gaps)):
            own = [gap for gap in gaps if gap.recipe == recipe]
            values: list[Any] = [
                {"loss": gap.loss_gap, "hidden": gap.hidden[-1], "gradient": gap.gradient}[what] for gap in own
            ]
            style: dict[str, Any] = {"color": MODEL_COLOURS[order], "marker": MARKERS[order], "label": recipe}
            axes.plot([gap.length for gap in own], values, **style)
        axes.set_title(TITLES[what])
        lengths = sorted({gap.length for gap in gaps})
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.set_xlabel("tokens of the text")
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))
        return Plot(svg_of(figure, what), CAPTIONS[what])
