import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.lines import Line2D

from tabom import load
from tabom.data.json_files import finished_lines
from tabom.lab.config import DEFAULT_SETTINGS, METHODS, PARALLEL
from tabom.lab.experiment import ShuffledPairs, ground_truth, right_answers, slowest_right
from tabom.lab.quickstart import QuickstartConfig, quickstart
from tabom.lab.report import markdown_table, verdict
from tabom.lab.study import BASE, SIZES, Run, StudyConfig, study, trajectories_of
from tabom.lab.study_report import attempts_table, attention_table, cell, curve, paired_table, report, scores, tables
from tabom.lab.tasks import Subtraction
from tabom.models.loading import SHIPPED_PATH
from tabom.training.config import TabomConfig
from tabom.training.examples import TrajectoryDataset
from tabom.training.objectives import ObjectiveSettings

pytestmark = pytest.mark.xdist_group("study")  # one process makes what all tests here read

TINY = {
    "methods": ["NELBO", "TABOM, whole path", "whole path, pairs shuffled"],
    "learning_rates": [3e-4],
    "seeds": [0, 1],
    "max_steps": 2,
    "path_steps": [1],
    "batch_size": 8,
    "num_prompts": 24,
    "num_problems": 12,
    "num_path_problems": 2,
    "num_other_problems": 3,
    "num_pass_problems": 2,
    "num_adaptive_problems": 4,
    "num_replayed": 3,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The results of a tiny study."""
    return study(StudyConfig(output_dir=str(tmp_path_factory.mktemp("study")), **TINY))


def by_run(path):
    return {json.dumps(record["run"]): record for record in finished_lines(path)}


def test_a_study_makes_every_run_of_its_grid_once(finished):
    results = list(finished_lines(finished))
    assert [(r["run"]["method"], r["run"]["seed"]) for r in results] == [
        (BASE, 0),
        ("NELBO", 0),
        ("TABOM, whole path", 0),
        ("whole path, pairs shuffled", 0),
        ("NELBO", 1),
        ("TABOM, whole path", 1),
        ("whole path, pairs shuffled", 1),
    ]
    for result in results[1:]:
        assert list(result["path"]) == ["1"] and 0 < result["kept"] < 24
        assert len(result["right"]["1 a step"]) == 12 and len(result["right"]["sudoku"]) == 3
        assert len(result["right_samples"]) == 2 and len(result["pair_order"]) == len(result["tds"]) == 3
        assert result["positions"] == {"1 a step": 12, "2 a step": 6, "4 a step": 3}  # 8 + 4 tokens, 4 of them decided
        for policy in result["adaptive"]:
            assert 1 <= policy["forward_passes"] <= 4
    before = finished.read_text()
    study(StudyConfig(output_dir=str(finished.parent), **TINY))
    assert finished.read_text() == before, "a second start repeats nothing"


def test_a_killed_study_goes_on_to_the_same_results(finished, tmp_path, pytestconfig):
    """Killed while a run is in flight, with half a line at the end of the file, then started again by two processes."""
    options = [
        str(word)
        for name, value in TINY.items()
        for word in (f"--{name}", *(value if isinstance(value, list) else [value]))
    ]
    command = [sys.executable, "-m", "tabom", "lab", "study", "--output_dir", str(tmp_path), *options]
    process = subprocess.Popen(command, cwd=pytestconfig.rootpath, stdout=subprocess.DEVNULL)
    path = tmp_path / "results.jsonl"
    while not path.exists() or path.read_text().count("\n") < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    done = path.read_text()
    assert done.count("\n") < 7, "it was killed too late to show anything"
    path.write_text(done[: done.rindex("\n") + 1] + '{"run": {"base": "ship')
    study(StudyConfig(output_dir=str(tmp_path), processes=2, **TINY))
    assert path.read_text().startswith(done[: done.rindex("\n") + 1])
    assert by_run(path) == by_run(finished) and len(list(finished_lines(path))) == 7


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="methods='GRPO': expected some of"):
        StudyConfig(methods=["GRPO"])


def test_pictures_have_at_most_four_lines_and_show_on_any_page(finished, tmp_path, monkeypatch):
    """Each line differs in colour, marker and dashes; the background is transparent."""
    figures = []
    saved = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), saved(self, *a, **k)))
    report(finished)
    assert len(figures) == 2
    for figure in figures:
        [axes] = figure.axes
        lines = axes.get_lines()
        assert 2 <= len(lines) <= 4 and axes.get_title()
        for look in (Line2D.get_color, Line2D.get_marker):
            assert len({look(line) for line in lines}) == len(lines)
    for name in ("paths.png", "passes.png"):
        pixels = imread(finished.parent / name)
        assert pixels.shape[1] == 800 and pixels[0, 0, 3] == 0


def test_the_pictures_of_the_documents_are_drawn_so():
    root = Path(__file__).parents[2]
    for path in (*root.glob("docs/*.png"), *root.glob("benchmarks/results/*.png")):
        pixels = imread(path)
        assert pixels.shape[1] == 800 and pixels[0, 0, 3] == 0, path


def test_the_report_of_a_study(finished, tmp_path):
    report(finished)
    for name in ("tables.md", "paths.png", "passes.png"):
        assert (finished.parent / name).stat().st_size > 0
    text = tables(list(finished_lines(finished)))
    assert "| TABOM, whole path | 2 |" in text and "| TABOM, whole path, less NELBO | 2 |" in text


def made_up(method, seed, right, **changes):
    run = {"base": "b", "task": "subtraction", "method": method, "learning_rate": 1e-4, "attempts": 1, "seed": seed}
    return {
        "run": {**run, "num_adaptive_problems": 2} | changes,
        "right": {"1 a step": right, "2 a step": "00", "4 a step": "00", "addition": "10", "sorting": "11"},
        "right_samples": [0, 16],
        "pair_order": [0.5, 1.0],
        "tds": [0.001, 0.003],
        "adaptive": [
            {"policy": "entropy_bound", "bound": 0.1, "accuracy": 1.0, "forward_passes": 1},
            {"policy": "threshold", "bound": 0.9, "accuracy": 0.5, "forward_passes": 2},
        ],
    }


def test_scores_and_errors_worked_out_by_hand():
    run = made_up("NELBO", 0, "0110")
    assert scores(run, "1 a step").tolist() == [0, 100, 100, 0]
    assert scores(run, "other tasks").tolist() == [100, 0, 100, 100]
    assert scores(run, "pass@16").tolist() == [0, 100]
    assert scores(run, "TDS") == pytest.approx([1, 3])
    assert curve(run) == [(1, 50), (2, 50)], "of the first two problems: 4 tokens in 2 passes"
    assert scores(run, "AUP") == pytest.approx([50 + 50 * np.exp(-1.5)])
    # Seeds: 50 and 100, so 75 +- 25. Problems: 50, 100, 100, 50, a standard deviation of 28.9 over the root of 4.
    assert cell(np.array([[0, 100, 100, 0], [100, 100, 100, 100]])) == "75.0 ±25.0 (14.4)"


def test_differences_are_paired_by_seed_and_learning_rate():
    runs = [
        made_up("TABOM", 0, "1110"),
        made_up("NELBO", 0, "0110"),  # +25
        made_up("NELBO", 1, "0000"),
        made_up("TABOM", 1, "1111"),  # +100
        made_up("TABOM", 2, "0000"),
        made_up("TABOM", 0, "0000", learning_rate=2e-4),  # without a partner
    ]
    [row] = [line for line in paired_table(runs) if line.startswith("| TABOM, less NELBO")]
    assert row.startswith("| TABOM, less NELBO | 2 | +62.5 ±37.5, 2 up | +0.0 ±0.0, 0 up")


def test_more_attempts_are_compared_with_one_at_the_same_seed():
    runs = [made_up("TABOM", seed, right, attempts=n) for seed, n, right in ((0, 1, "00"), (0, 8, "11"), (1, 8, "11"))]
    for run in runs:
        run["run"]["num_problems"] = 2
    assert (
        attempts_table(runs)[-2] == "| subtraction, b, TABOM: 8 less 1 | 1 | +100.0, 1 up | +0.0, 0 up | +0.0, 0 up |"
    )


def test_the_two_kinds_of_attention_stand_beside_each_other():
    def run(base, method, seed, right, block_size=None, **changes):
        sizes = dict.fromkeys(SIZES, 1) | {"base": base}
        counted = {"block_size": block_size, "positions": {"1 a step": 6.25, "2 a step": 4}} if block_size else {}
        return made_up(method, seed, right, **sizes, **changes) | counted

    untrained = {"learning_rate": 0.0, "attempts": 0}
    runs = [
        run("shipped", BASE, 0, "0001", **untrained),
        run("shipped", "NELBO", 0, "0110"),
        run("shipped", "window", 0, "1111"),  # not trained from the other base
        run("shipped", "NELBO", 0, "1111", learning_rate=1.0),  # nor at this learning rate
        run("runs/block", BASE, 0, "0010", 4, **untrained),
        run("runs/block", "NELBO", 0, "1110", 4),
        run("runs/block", "NELBO", 1, "1111", 4),
    ]
    assert [line.split(" | 0.0")[0] for line in attention_table(runs)[4:-1]] == [
        "| subtraction | base | shipped | full | 1 | 25.0 (25.0)",
        "| subtraction | base | block | blocks of 4 | 1 | 25.0 (25.0)",
        "| subtraction | NELBO | shipped | full | 1 | 50.0 (28.9)",
        "| subtraction | NELBO | block | blocks of 4 | 2 | 87.5 ±12.5 (12.5)",
    ]
    assert attention_table(runs)[5].endswith("| 75.0 (25.0) | 6.25, 4.00 |")
    assert attention_table(runs)[4].endswith("| 75.0 (25.0) | not counted |")
    assert attention_table(runs[:4]) == []


def test_shuffled_pairs_keep_all_but_the_order(seed):
    base = load(SHIPPED_PATH)
    truth = ground_truth(base, Subtraction().prompt_set(40, "train", 0))
    dataset = TrajectoryDataset(truth, base.tokenizer, ObjectiveSettings("tabom", "all", "all"), seed)
    shuffled = ShuffledPairs(dataset)
    changed = 0
    for index in range(40):
        before, after = dataset[0, index].target, shuffled[0, index].target
        assert sorted(before.steps) == sorted(after.steps) and ((before.steps >= 0) == (after.steps >= 0)).all()
        assert all((a == b).all() for a, b in zip(before[:2], after[:2], strict=True))
        changed += (before.steps != after.steps).any()
    assert changed > 10


def test_more_attempts_keep_more_and_one_answer_a_prompt():
    base = load(SHIPPED_PATH)
    prompts = Subtraction().prompt_set(60, "train", 1)
    once, eight = (right_answers(base, prompts, 4, attempts) for attempts in (1, 8))
    assert len(once) < len(eight)
    for found in (once, eight):
        asked = [trajectory.prompt for trajectory in found]
        assert len(set(asked)) == len(asked) and asked == [p for p in prompts.prompts if p in asked]
        truth = dict(zip(prompts.prompts, prompts.answers, strict=True))
        assert all(trajectory.response == truth[trajectory.prompt] for trajectory in found)


def test_answers_of_a_pace_are_decoded_at_it():
    base = load(SHIPPED_PATH)
    prompts = Subtraction().prompt_set(40, "train", 1)
    for pace in (1, 2, 4):
        found = right_answers(base, prompts, 4, pace=pace)
        assert found and {max(trajectory.decoding_order) + 1 for trajectory in found} == {4 // pace}


def test_the_slowest_right_response_to_a_prompt_is_trained_on(tmp_path):
    """Also a name of a set stands for its methods."""
    sizes = TINY | {"methods": ["parallel"], "seeds": [0], "num_prompts": 40}
    config = StudyConfig(output_dir=str(tmp_path), **sizes)
    results = list(finished_lines(study(config)))
    assert [result["run"]["method"] for result in results[1:]] == list(PARALLEL)
    base, run = load(SHIPPED_PATH), Run(**results[1]["run"])
    right = {pace: trajectories_of(run, "train", tmp_path, base, pace) for pace in (4, 1, 2)}
    kept = slowest_right(right)
    assert all(result["kept"] == len(kept) for result in results[1:])
    prompts = {pace: {each.prompt for each in trajectories} for pace, trajectories in right.items()}
    assert prompts[2] - prompts[1] and prompts[4] - prompts[2] - prompts[1], "or nothing is shown"
    assert sorted(each.prompt for each in kept) == sorted(set().union(*prompts.values()))
    for each in kept:
        steps = max(each.decoding_order) + 1
        assert steps == next(4 // pace for pace in (1, 2, 4) if each.prompt in prompts[pace])


def test_the_default_settings_of_the_lab_are_those_of_the_trainer(tmp_path):
    config = TabomConfig(str(tmp_path), use_cpu=True, report_to="none")
    assert {name: getattr(config, name) for name in DEFAULT_SETTINGS} == DEFAULT_SETTINGS


def test_every_ranked_method_names_its_ranking_in_full():
    """Else a new default would change what the results of the study were made with."""
    for name, method in METHODS.items():
        if method.settings["objective"] == "tabom" or "rank_weight" in method.settings:
            assert {"rank_loss", "rank_weight", "rank_margin"} <= method.settings.keys(), name


def test_verdicts():
    assert verdict(2.1, 1.0) == "higher" and verdict(-2.1, 1.0) == "lower"
    assert verdict(1.9, 1.0) == verdict(-2.0, 1.0) == verdict(0.0, 0.0) == "no clear difference"


def test_the_quickstart_end_to_end(tmp_path, capsys):
    config = QuickstartConfig(
        output_dir=str(tmp_path),
        num_prompts=40,
        num_problems=20,
        num_other_problems=3,
        num_pass_problems=3,
        max_steps=4,
        batch_size=8,
        attempts=2,
        processes=1,
    )
    results = quickstart(config)
    columns = ["base", "NELBO, exact weights", "TABOM, defaults", "TABOM, parallel"]
    assert list(results) == columns and [len(runs) for runs in results.values()] == [1, 1, 1, 1]
    assert results["TABOM, parallel"][0]["kept"] >= results["TABOM, defaults"][0]["kept"] > 0
    for name in ("accuracy_by_pace.png", "entropy_by_step.png"):
        assert (tmp_path / name).stat().st_size > 0
    assert load(tmp_path / "models" / "TABOM-parallel-seed-0").model.num_parameters() > 1e6
    measures = json.loads((tmp_path / "results.json").read_text())["measures"]
    assert list(measures) == columns and len(markdown_table(measures).splitlines()) == 9
    out = capsys.readouterr().out
    assert "TABOM, defaults, against NELBO" in out and "two standard errors" in out
