"""Every page in a real browser: drawn whole, in light and dark, on a narrow screen, without asking for anything."""

import random
from collections.abc import Mapping
from pathlib import Path

import pytest

from longred_megatron import train
from longred_megatron.bench.base import QUICK
from longred_megatron.bench.report import write_report as write_bench
from longred_megatron.bench.results import Result, Timed
from longred_megatron.doctor.examination import Section
from longred_megatron.doctor.findings import Finding
from longred_megatron.doctor.page import render
from longred_megatron.recipe import load_recipe
from longred_megatron.study.measure import Measured
from longred_megatron.study.report import write_report
from longred_megatron.study.results import verdict
from longred_megatron.study.settings import load_study
from tests.browser import look, needs_browser
from tests.evaluation.conftest import byte_tokenizer, llama
from tests.training.workspace import make_workspace
from tools import analyze, evaluate, plan, select_layers

pytestmark = needs_browser
STUDIES = {
    "drift": ("--short", "16"),
    "positional-vectors": ("--length", "128"),
    "perturbation": ("--thetas", "1e6"),
    "query-states": (),
}
ROOT = Path(__file__).resolve().parent.parent
NARROW = 500  # pixels: chromium makes no narrower window


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    recipe = make_workspace(folder)
    texts, models = ("--text", str(folder / "texts")), ("--hf", str(folder / "model"), str(folder / "teacher"))
    for study, more in STUDIES.items():
        analyze.main([study, *models, *texts, "--texts", "3", *more, "--output", str(folder / study)])
    steps = ("training.steps=2", "training.checkpoint_every_steps=1", "training.keep_checkpoints=2")
    train.main([str(recipe), *steps])
    series = ("--runs", str(folder / "run"), "--scores", "60", "57", "55", "58", "--texts", "3")
    analyze.main(["drift", *models, *texts, *series, "--output", str(folder / "drift_series")])
    lengths = ("--lengths", "16", "32", "--recipes", "tensorwise", "delayed+attention")
    analyze.main(["fp8", *models[:2], *texts, *lengths, "--output", str(folder / "fp8")])
    more = ("--texts", "2", "--rope", "yarn", "--output", str(folder / "layers"))
    select_layers.main([str(recipe), *more])
    for name, window in (("original", 128), ("extended", 256)):
        llama(window).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    asked = ("--short-windows", "4", "--long-windows", "2", "--samples", "2", "--depths", "2")
    models = ("--hf", str(folder / "original"), str(folder / "extended"))
    evaluate.main([*models, *asked, "--output", str(folder / "evaluation")])
    shape = ("precision.params=bf16", "parallel.pipeline=2", "--gpu", "h100-80gb", "--gpus", "2", "--search")
    plan.main([str(recipe), *shape, "--output", str(folder / "plan")])
    timed = Timed([1.0, 1.2, 0.9], 2**30, 32768, 1e12)
    results = [Result("longred_step", f"{n} layers, fp32", "tokens", 2e12, 1, {}, timed, timed) for n in (8, 30)]
    write_bench(folder / "bench", results, {"fp32": 2e12}, QUICK, "tools/bench.py")
    pages = {path.parent.name: path for path in folder.glob("*/report.html")}
    pages["study"] = study_page(folder)
    sections = [
        Section("Links", [Finding(f"thing {i}", status, "seen", "change it", trace="a\nb")])
        for i, status in enumerate(("ok", "wrong", "not tried"))
    ]
    pages["doctor"] = folder / "doctor.html"
    pages["doctor"].write_text(render(sections, load_recipe(recipe), "tools/doctor.py", 1.0))
    return pages


def study_page(folder: Path) -> Path:
    """The page of the toy study, with invented figures."""
    study = load_study(ROOT / "recipes/studies/tiny_longred.yaml").model_copy(update={"dir": folder / "toy"})
    rng = random.Random(0)

    def measured() -> Measured:
        short, long = ([rng.gauss(2.7, 0.1) for _ in range(8)] for _ in range(2))
        return Measured("", short, long, {n: rng.choices((0.0, 1.0), k=20) for n in (1024, 2048)}, 0.99)

    rows = {name: [measured() for _ in range(1 if name == "original" else 3)] for name in study.rows()}
    write_report(study, rows, [verdict(rows, ordering) for ordering in study.orderings], "make study-longred")
    return folder / "toy/report/report.html"


@pytest.mark.parametrize(
    "name", [*STUDIES, "drift_series", "fp8", "layers", "evaluation", "study", "plan", "doctor", "bench"]
)
def test_a_page_can_be_read(name: str, pages: Mapping[str, Path], tmp_path: Path) -> None:
    by_day, by_night = (look(pages[name], tmp_path, dark) for dark in (False, True))
    assert by_day.paper > 0.8 and by_night.paper < 0.05
    for seen in (by_day, by_night, look(pages[name], tmp_path, False, width=NARROW)):
        assert len(seen.text) > 200 and all(width > 300 and height > 100 for width, height in seen.figures)
        assert (len(seen.figures) > 0) == (name != "doctor")
        assert seen.width <= seen.window and seen.faint == {} and seen.asked == []


def test_what_cannot_be_read_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        '<body style="background: #fff; color: #bbb"><p style="width: 2000px">pale</p><img src="http://a.invalid/b">'
        '<svg><text fill="#ccc">label</text></svg>'
    )
    seen = look(page, tmp_path, dark=False)
    assert seen.faint.keys() == {"pale", "label"}
    assert seen.width > seen.window and seen.asked == ["http://a.invalid/b"]
