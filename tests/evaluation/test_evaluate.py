import importlib.util
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from longred_megatron.errors import UserError
from longred_megatron.evaluation import page, tasks
from longred_megatron.evaluation.benchmarks.results import BenchmarkResult, by_ability
from longred_megatron.evaluation.evaluate import evaluate, write_prompt_file
from longred_megatron.evaluation.report import KIND, Report, format_table
from longred_megatron.evaluation.settings import Settings
from longred_megatron.evaluation.subjects import default_names
from tests.evaluation.conftest import byte_tokenizer
from tests.evaluation.tasks.test_base import Letters

SMALL = {"num_short_windows": 4, "num_long_windows": 2, "num_depths": 3, "num_samples": 2}
SMALL |= {"num_prompt_sets": 2, "num_keys": 3}


def settings_for(text_file: Path, **changes) -> Settings:
    return Settings(**({"short_texts": (text_file,), "long_texts": (text_file,), "device": "cpu"} | SMALL | changes))


@pytest.fixture(scope="session")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluation") / "new" / "report"


@pytest.fixture(scope="session")
def report(folders: dict[str, Path], text_file: Path, output: Path) -> Report:
    models = [folders["base"], folders["longer"], folders["wider"]]
    names = ["the original", "the <longer>", "wide"]
    return evaluate(
        models,
        output,
        settings=settings_for(text_file),
        names=names,
        command="python tools/evaluate.py --hf ...",
    )


@pytest.fixture(scope="session")
def tool() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "evaluate.py"
    spec = importlib.util.spec_from_file_location("evaluate_tool", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_json_holds_every_cell_and_setting(report: Report, output: Path) -> None:
    held = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert held["kind"] == KIND
    assert (held["original_window"], held["extended_window"]) == (128, 256)
    assert held["settings"]["num_samples"] == 2 and held["settings"]["dtype"] == "float32"
    assert {"torch", "transformers", "python", "longred_megatron", "device"} <= set(held["versions"])
    assert [model["name"] for model in held["models"]] == ["the original", "the <longer>", "wide"]
    for model in held["models"]:
        assert (model["short"]["window"], model["short"]["num_windows"]) == (128, 4)
        assert (model["long"]["window"], model["long"]["num_windows"]) == (256, 2)
        for task, num_keys, lengths in (("passkey", 1, {128, 256}), ("multi-key", 3, {256})):
            result = next(result for result in model["retrieval"] if result["task"] == task)
            assert result["num_keys"] == num_keys
            cells = {(cell["length"], cell["depth"]): cell for cell in result["cells"]}
            assert set(cells) == {(length, depth) for length in lengths for depth in (0.0, 0.5, 1.0)}
            assert all(cell["num_samples"] == len(cell["scores"]) == 4 for cell in cells.values())
            assert all(cell["accuracy"] == sum(cell["sets"]) / 2 for cell in cells.values())
    assert len(held["models"][1]["similarity"]["by_layer"]) == 3


def test_notes_say_what_was_left_out(report: Report) -> None:
    original, longer, wide = report.models
    assert original.is_reference and original.similarity is None
    assert longer.similarity is not None
    assert wide.similarity is None and "width 32" in " ".join(wide.notes)
    assert "passkey: left out at 32, 64 tokens" in " ".join(longer.notes)
    notes = format_table(report).splitlines()[6:]
    assert len([note for note in notes if "passkey: left out" in note]) == 1  # said once, not for every model
    assert any("short texts: the 4 windows are of fewer than 8 documents (1)" in note for note in notes)


def test_fewer_windows_than_asked_for_and_shared_filler_are_told(
    folders: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    asked = {"num_short_windows": 9, "num_prompt_sets": 5, "num_samples": 4, "extended_window": 256}
    result = evaluate([folders["longer"]], tmp_path, settings=settings_for(text_file, **asked))
    notes = "\n".join(result.models[0].notes)
    assert "short texts: 4 of 9 windows asked for" in notes
    assert "prompts share filler: there are 60 of a length, and stretches that do not overlap in the " in notes


def test_intervals_and_differences_are_in_the_results(report: Report, output: Path) -> None:
    held = json.loads((output / "results.json").read_text(encoding="utf-8"))
    original, longer, _ = held["models"]
    for model in held["models"]:
        for result in model["retrieval"]:
            for score in result["by_length"]:
                cells = [cell for cell in result["cells"] if cell["length"] == score["length"]]
                scores = [each for cell in cells for each in cell["scores"]]
                assert score["accuracy"] == pytest.approx(sum(scores) / len(scores))
                assert (
                    len(score["sets"]) == 2
                    and score["interval"]["low"] <= score["accuracy"] <= score["interval"]["high"]
                )
    assert original["short"]["against_reference"] is None
    difference = longer["short"]["against_reference"]
    assert difference["loss"] == pytest.approx(longer["short"]["loss"] - original["short"]["loss"])
    assert longer["retrieval"][0]["by_length"][0]["difference"] == 0.0
    assert longer["retrieval"][0]["by_length"][0]["difference_interval"]["low"] < 0


def test_tasks_of_a_group_have_a_table_of_their_own(report: Report) -> None:
    models = tuple(
        replace(model, retrieval=tuple(replace(result, group="both") for result in model.retrieval))
        for model in report.models
    )
    grouped = replace(report, models=models)
    lines = format_table(grouped).splitlines()
    assert "both @256" in lines[0] and "passkey" not in lines[0]
    start = lines.index("Tasks at their longest length:")
    assert lines[start + 1].split() == ["task", "the", "original", "the", "<longer>", "wide"]
    assert [line.split()[0] for line in lines[start + 3 : start + 5]] == ["passkey", "multi-key"]
    html = page.render(grouped)
    assert "Tasks at their longest length" in html and "multi-key @256" in html and "BOTH, 2 tasks" in html


def test_effective_lengths_are_in_table_page_and_results(report: Report) -> None:
    lines = format_table(report).splitlines()
    start = lines.index("Effective length:")
    assert lines[start + 3].split("  ")[0] == "passkey, at least 85.6 %"
    assert lines[start + 3].count("none (asked 86 %)") == 3
    assert "<h2>Effective length</h2>" in page.render(report)
    [first, *_] = json.loads(report.to_json())["models"][0]["effective_lengths"]
    assert first == {
        "name": "passkey", "rule": "at least 85.6 %", "threshold": 0.856, "length": None, "sure_length": None,
        "measured": 256,
    }  # fmt: skip


def test_questions_are_asked_and_named_in_the_results(
    folders: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    questions = tmp_path / "questions.jsonl"
    lines = [{"question": f"Who is {n}?", "answers": [f"Ann {n}"], "context": f"Ann {n} is {n}."} for n in range(3)]
    questions.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    settings = Settings(
        (text_file,), (text_file,), num_short_windows=2, num_long_windows=2, lengths=(700,), tasks=("qa_1",),
        num_depths=1, num_prompt_sets=1, num_samples=2, questions=questions, device="cpu",
    )  # fmt: skip
    evaluate([folders["base"]], tmp_path / "out", settings=settings)
    held = json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))
    assert held["settings"]["questions"] == str(questions) and held["settings"]["benchmark_tasks"] is None
    [result] = held["models"][0]["retrieval"]
    assert (result["task"], result["group"], result["num_questions"], result["num_documents"]) == (
        "qa_1",
        "ruler",
        3,
        3,
    )


def test_benchmarks_are_in_table_page_and_results(report: Report) -> None:
    def result(scores: list[float]) -> BenchmarkResult:
        return BenchmarkResult("piqa", "language", "piqa", "acc,none", None, 4, sum(scores) / 4, tuple(scores))

    before, after = (result([1.0, 1.0, 1.0, 0.0]),), (result([1.0, 1.0, 0.0, 0.0]),)
    models = tuple(
        replace(model, benchmarks=before)
        if model.is_reference
        else replace(model, benchmarks=after, abilities=by_ability(after, before))
        for model in report.models
    )
    measured = replace(report, models=models)
    lines = format_table(measured).splitlines()
    start = lines.index("Published benchmarks on short texts:")
    scores, kept = lines[start + 3 : start + 5]
    assert scores.startswith("piqa (4 questions)  75 % (30 to 95 %)  50 % (15 to 85 %)")
    assert kept.startswith("language, kept") and "reference" in kept and "67 % (" in kept
    html = page.render(measured)
    assert "<h2>Published benchmarks on short texts</h2>" in html and "language, kept" in html
    assert json.loads(measured.to_json())["models"][1]["abilities"][0]["kept"] == pytest.approx(2 / 3)
    assert "Published benchmarks" not in format_table(report) + page.render(report)


def test_table_is_aligned_and_complete(report: Report) -> None:
    lines = format_table(report).splitlines()
    head, rule, *rows = lines[:5]
    assert len({len(line) for line in (head, rule, *rows)}) == 1
    assert "short ppl @128" in head and "long ppl @256" in head and "passkey @256" in head and "similarity" in head
    for model, row in zip(report.models, rows, strict=True):
        assert row.startswith(model.name)
        assert f"{model.short.perplexity:.2f}" in row or f"{model.short.perplexity:,.0f}" in row
    assert any("width 32" in line for line in lines[5:])


def test_page_is_self_contained_and_names_every_model(report: Report, output: Path) -> None:
    html = (output / "report.html").read_text(encoding="utf-8")
    for name in ("the original", "the &lt;longer&gt;", "wide"):
        assert name in html
    assert "<longer>" not in html
    assert not re.search(r"https?:|@import|<script|<link|src=", html)
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    assert html.count("<svg") == 7  # losses, differences, lengths, three heat maps, similarity
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', html)) <= set(ids)
    assert not re.search(r"#0a000\d|#010101|#020202", html)  # every stand-in colour became a variable of the page
    assert "python tools/evaluate.py --hf ..." in html


def test_page_without_anything_to_compare(folders: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    """One model: nothing beside it, one window."""
    alone = evaluate([folders["longer"]], tmp_path, settings=settings_for(text_file, extended_window=256))
    assert (alone.original_window, alone.extended_window) == (256, 256)
    assert "Hidden states against" not in page.render(alone)


def test_reference_outside_the_models_is_measured_first(
    folders: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    result = evaluate(
        [folders["longer"]],
        tmp_path,
        settings=settings_for(text_file, num_samples=1),
        reference=folders["onebos"],
        names=["mine"],
    )
    assert [(model.name, model.is_reference) for model in result.models] == [
        ("onebos", True),
        ("mine", False),
    ]
    assert result.original_window == 128
    assert any("tokenizers differ" in note for note in result.notes)


def test_names_are_the_shortest_ends_that_differ() -> None:
    assert default_names([Path("/m/a"), Path("/m/b")]) == ["a", "b"]
    assert default_names([Path("/runs/a/hf"), Path("/runs/b/hf")]) == ["a/hf", "b/hf"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extended_window": 64}, "--window 64: is below the original window 128"),
        ({"num_samples": 0}, "--samples 0"),
        ({"num_keys": 1}, "--keys 1: must be 2 to 100"),
        ({"num_prompt_sets": 0}, "--prompt-sets 0"),
        ({"tasks": ()}, "--tasks: none given"),
        ({"tasks": ("passkeys",)}, "--tasks passkeys: no such task; did you mean passkey?"),
        ({"lengths": (0,)}, "--lengths 0"),
        ({"dtype": "int8"}, "--dtype int8"),
        ({"tokens_per_batch": 0}, "--tokens-per-batch 0"),
        ({"original_window": 1}, "--original-window 1"),
        ({"extended_window": 10**6}, "texts too short"),
        ({"short_texts": (Path("none.txt"),)}, "none.txt does not exist"),
    ],
)
def test_bad_settings(folders: dict[str, Path], text_file: Path, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        evaluate([folders["base"]], tmp_path / "report", settings=settings_for(text_file, **changes))
    assert not (tmp_path / "report").exists()


def test_every_problem_with_the_models_comes_in_one_error(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        evaluate(
            [folders["base"], tmp_path / "none", tmp_path / "empty"],
            tmp_path / "report",
            names=["one", "one"],
        )
    text = "\n".join(caught.value.problems)
    for part in (
        "none: no such folder",
        "empty: has no config.json",
        "2 names for 3 models",
        "a name is given twice",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("config.json", "transformers cannot read it"),
        ("tokenizer", "tokenizer .*: transformers cannot load it"),
        ("weights", "neither model.safetensors nor"),
        ("window", "max_position_embeddings is missing"),
        ("positions", "has no rotary positions"),
    ],
)
def test_broken_model_folders(
    folders: dict[str, Path], text_file: Path, tmp_path: Path, spoil: str, message: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(folders["base"], model)
    if spoil == "config.json":
        (model / "config.json").write_text('{"model_type": "unheard-of"}', encoding="utf-8")
    elif spoil == "tokenizer":
        for file in model.glob("token*"):
            file.unlink()
    elif spoil == "weights":
        (model / "model.safetensors").unlink()
    elif spoil == "window":
        (model / "config.json").write_text('{"model_type": "bloom"}', encoding="utf-8")
    else:
        (model / "config.json").write_text('{"model_type": "gpt2", "n_positions": 64}', encoding="utf-8")
    with pytest.raises(UserError, match=message):
        evaluate([model], tmp_path / "report", settings=settings_for(text_file, extended_window=256))


def test_output_with_other_files_is_refused_and_left_alone(
    folders: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "results.json"
    for content in ("{}", "not json", '{"kind": "other"}'):
        kept.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match="not empty and holds no earlier report"):
            evaluate([folders["base"]], tmp_path, settings=settings_for(text_file))
        assert [file.name for file in tmp_path.iterdir()] == ["results.json"] and kept.read_text(
            encoding="utf-8"
        ) == content
    with pytest.raises(UserError, match="is a file"):
        evaluate([folders["base"]], kept, settings=settings_for(text_file))


def test_earlier_report_is_replaced(
    report: Report, output: Path, folders: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    shutil.copytree(output, tmp_path / "again")
    evaluate([folders["base"]], tmp_path / "again", settings=settings_for(text_file, extended_window=256))
    assert sorted(file.name for file in (tmp_path / "again").iterdir()) == ["report.html", "results.json"]
    assert len(json.loads((tmp_path / "again" / "results.json").read_text(encoding="utf-8"))["models"]) == 1


def test_command_line(
    tool: ModuleType,
    folders: dict[str, Path],
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = ["--hf", str(folders["base"]), "--output", str(tmp_path), "--text", str(text_file)]
    windows = ["--window", "256", "--short-windows", "2", "--long-windows", "1", "--lengths", "256", "128"]
    tasks = ["--depths", "2", "--samples", "1", "--keys", "2", "--name", "original", "--device", "cpu"]
    tool.main([*places, *windows, *tasks])
    printed = capsys.readouterr()
    assert "original" in printed.out and "report.html" in printed.out
    assert printed.err == ""
    held = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert held["command"].startswith("python tools/evaluate.py --hf")
    assert held["settings"]["lengths"] == [128, 256]
    assert (held["models"][0]["short"]["num_windows"], held["models"][0]["long"]["num_windows"]) == (2, 1)


def test_command_line_exits_with_two_on_a_users_mistake(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--hf", str(tmp_path / "none"), "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as caught:
        tool.run_cli(tool.main)
    assert caught.value.code == 2
    assert "none: no such folder" in capsys.readouterr().err


def test_prompts_are_written_and_nothing_is_measured(
    tool: ModuleType, folders: dict[str, Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads the file alone gets the score of the report: here with transformers' `generate`."""
    asked = ["--hf", str(folders["onebos"]), "--text", str(text_file), "--lengths", "128", "--samples", "2"]
    asked += ["--window", "256", "--short-windows", "1", "--long-windows", "1", "--depths", "2", "--keys", "2"]
    asked += ["--tasks", "passkey", "letters"]
    monkeypatch.setitem(tasks.TASKS, "letters", Letters)
    tool.main([*asked, "--output", str(tmp_path / "report")])
    forward = LlamaForCausalLM.forward
    monkeypatch.setattr(LlamaForCausalLM, "forward", None)
    path = tmp_path / "new" / "prompts.jsonl"
    tool.main([*asked, "--write-prompts", str(path)])
    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    held = json.loads((tmp_path / "report" / "results.json").read_text(encoding="utf-8"))
    results = {result["task"]: result for result in held["models"][0]["retrieval"]}
    assert {line["task"] for line in lines} == set(results)
    network = LlamaForCausalLM.from_pretrained(folders["onebos"])
    network.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=1)
    tokenizer = byte_tokenizer(bos=True)
    scores = []
    for line in lines:
        assert tokenizer(line["text"], add_special_tokens=False).input_ids == line["tokens"]
        written = network.generate(
            torch.tensor([line["tokens"]]), max_new_tokens=line["max_new_tokens"], do_sample=False
        )[0, len(line["tokens"]) :].tolist()
        if line["answer"]:
            score = float(written[: len(line["answer"])] == line["answer"])
        else:
            text = tokenizer.decode(written, skip_special_tokens=True).lower()
            score = sum(each.lower() in text for each in line["expected"]) / len(line["expected"])
        cells = results[line["task"]]["cells"]
        [cell] = [c for c in cells if (c["length"], c["depth"]) == (line["length"], line["depth"])]
        per_set = len(cell["scores"]) // 3
        assert cell["scores"][line["prompt_set"] * per_set + line["sample"]] == score
        scores.append(score)
    assert len(set(scores)) > 1


def test_prompts_are_not_written_over_a_file(folders: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    kept.write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"kept.jsonl: is there already"):
        write_prompt_file([folders["base"]], kept, settings=settings_for(text_file))
    with pytest.raises(UserError, match="tokenizers differ; write a file for each"):
        write_prompt_file(
            [folders["base"], folders["onebos"]],
            tmp_path / "new.jsonl",
            settings=settings_for(text_file, extended_window=256),
        )
    assert kept.read_text(encoding="utf-8") == "mine" and [*tmp_path.iterdir()] == [kept]
