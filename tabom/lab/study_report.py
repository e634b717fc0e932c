"""What a study found: tables and pictures from its JSON lines."""

from collections import defaultdict
from collections.abc import Collection, Iterable
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tabom.data.json_files import finished_lines
from tabom.evaluation.metrics import accuracy_under_parallelism, pass_at_k
from tabom.evaluation.pictures import BASE as BASE_LOOK
from tabom.evaluation.pictures import OTHERS, TUNED, legend_below, picture
from tabom.lab.config import DEFAULT, METHODS, PASS_SAMPLES, RANK_LOSSES
from tabom.lab.experiment import WEAK_TASKS
from tabom.lab.study import BASE, SIZES, TOKENS_PER_STEP

Result = dict[str, Any]
"""A line of results.jsonl."""

MEASURES = ("1 a step", "2 a step", "4 a step", "AUP", "pass@16", "other tasks", "pair order", "TDS")
COMPARED = ("1 a step", "2 a step", "4 a step", "AUP", "pass@16", "other tasks", "pair order")
ATTENTION_MEASURES = ("1 a step", "2 a step", "4 a step", "other tasks")
COMPARISONS = (
    ("TABOM, whole path", "NELBO"),
    ("TABOM, whole path", "NELBO, exact weights"),
    ("TABOM, whole path", "whole path"),
    ("TABOM, whole path", "whole path, pairs shuffled"),
    ("TABOM, whole path", "TABOM"),
    ("TABOM", "NELBO"),
    ("TABOM", "window"),
    ("TABOM", "TABOM as released"),
    ("NELBO with ranking", "NELBO"),
    ("NELBO, exact weights", "NELBO"),
    ("whole path", "NELBO, exact weights"),
    ("TABOM, parallel", "NELBO, exact weights"),
    ("TABOM, parallel", "whole path"),
    ("TABOM, parallel", "NELBO, exact weights, several paces"),
    ("TABOM, parallel", "whole path, several paces"),
    ("NELBO, exact weights, several paces", "NELBO, exact weights"),
    ("whole path, several paces", "whole path"),
)
"""Paired by base, task, attempts, seed and learning rate: the first less the second."""
PICTURED = ("TABOM, parallel", "TABOM, whole path", DEFAULT, "whole path", "NELBO, exact weights", "NELBO")
"""A picture shows the first three of these that a study has."""


class Group(NamedTuple):
    """The runs that one table compares."""

    base: str
    task: str
    attempts: int


def group_of(result: Result) -> Group:
    """The group of a run."""
    run = result["run"]
    return Group(run["base"], run["task"], run["attempts"])


def base_of(results: Iterable[Result], trained: Result) -> Result:
    """The run that trained nothing, of the same base, task and problems."""
    sizes = {name: trained["run"][name] for name in ("base", "task", *SIZES)}
    return next(r for r in results if r["run"]["method"] == BASE and sizes.items() <= r["run"].items())


def groups_of(results: Iterable[Result]) -> list[Group]:
    """The groups in which something was trained, in the order of their first run."""
    return list(dict.fromkeys(group_of(result) for result in results if result["run"]["method"] != BASE))


def scores(result: Result, measure: str) -> np.ndarray:
    """One score a problem: percent, TDS in thousandths of nats^2. AUP is one score for all problems."""
    if measure == "AUP":
        return np.array([accuracy_under_parallelism(*zip(*curve(result), strict=True))])
    if measure in result["right"]:
        return digits_of(result["right"][measure])
    if measure == "other tasks":
        weak = {f"{k} a step" for k in TOKENS_PER_STEP}
        return digits_of("".join(right for name, right in result["right"].items() if name not in weak))
    if measure.startswith("pass@"):
        k = int(measure.removeprefix("pass@"))
        return 100 * pass_at_k(np.array(result["right_samples"]), PASS_SAMPLES, k)
    return 100 * np.array(result["pair_order"]) if measure == "pair order" else 1000 * np.array(result["tds"])


def curve(result: Result, policy: str = "threshold") -> list[tuple[float, float]]:
    """Points of (tokens a forward pass, accuracy in percent): one token a step, and each bound of an adaptive policy.

    All are of the same problems; a run that tried no adaptive policy has the first point only, of all problems.
    """
    run, length = result["run"], WEAK_TASKS[result["run"]["task"]].response_length
    slowest = digits_of(result["right"]["1 a step"][: run["num_adaptive_problems"] or None]).mean()
    adaptive = [each for each in result["adaptive"] if each["policy"] == policy]
    return [(1.0, slowest), *((length / each["forward_passes"], 100 * each["accuracy"]) for each in adaptive)]


def error(values: np.ndarray) -> float:
    """Standard error of a mean; NaN for a single value."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def tables(results: list[Result]) -> str:
    """Markdown: for each group a table of each learning rate, and one of paired differences over all of them."""
    texts = [text for group in groups_of(results) for text in group_tables(results, group)]
    return "\n".join([*texts, *attempts_table(results), *attention_table(results)])


def group_tables(results: list[Result], group: Group) -> list[str]:
    """The tables of one group."""
    runs = [r for r in results if r["run"]["method"] != BASE and group_of(r) == group]
    attempts = "one greedy answer" if group.attempts == 1 else f"{group.attempts} attempts"
    title = f"### {group.task}, base {Path(group.base).name}, {attempts} a prompt"
    texts = [title, "", kept_sentence(runs), ""]
    for rate in sorted({r["run"]["learning_rate"] for r in runs}):
        rows = by_method(r for r in runs if r["run"]["learning_rate"] == rate)
        texts += [*table(f"LR {rate:g}", {BASE: [base_of(results, runs[0])], **rows}), ""]
    return [*texts, *paired_table(runs), ""]


def kept_sentence(runs: list[Result]) -> str:
    """A sentence on how many trajectories the runs trained on."""
    kept = sorted({r["kept"] for r in runs if not METHODS[r["run"]["method"]].on_truth})
    spread = f"{kept[0]}" if len(kept) == 1 else f"{kept[0]} to {kept[-1]}"
    return f"{spread} of {runs[0]['run']['num_prompts']} answers were right and kept."


def by_method(runs: Iterable[Result]) -> dict[str, list[Result]]:
    """The runs of each method, in the order of METHODS."""
    found = defaultdict(list)
    for run in runs:
        found[run["run"]["method"]].append(run)
    return {method: found[method] for method in METHODS if method in found}


def table(corner: str, rows: dict[str, list[Result]]) -> list[str]:
    """Means over seeds and problems, ± standard error over seeds, and over problems in brackets."""
    lines = [f"| {corner} | seeds | {' | '.join(MEASURES)} |", f"| --- |{' --- |' * (len(MEASURES) + 1)}"]
    for name, runs in rows.items():
        cells = [cell(np.array([scores(run, measure) for run in runs])) for measure in MEASURES]
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    return lines


def cell(by_seed: np.ndarray) -> str:
    """`70.8 ±0.8 (2.1)` of (seeds, problems) scores; one seed or one score has no error over seeds or problems."""
    over_seeds = f" ±{error(by_seed.mean(1)):.1f}" if len(by_seed) > 1 else ""
    over_problems = f" ({error(by_seed.mean(0)):.1f})" if by_seed.shape[1] > 1 else ""
    return f"{by_seed.mean():.1f}{over_seeds}{over_problems}"


def paired_table(runs: list[Result]) -> list[str]:
    """Differences of two methods at the same seed and learning rate, ± standard error over these pairs."""
    found = {(r["run"]["method"], r["run"]["seed"], r["run"]["learning_rate"]): r for r in runs}
    lines = [f"| paired difference | pairs | {' | '.join(COMPARED)} |", f"| --- |{' --- |' * (len(COMPARED) + 1)}"]
    for first, second in (*COMPARISONS, *((name, "whole path") for name in RANK_LOSSES)):
        pairs = [
            (r, found[second, *key])
            for (method, *key), r in found.items()
            if method == first and (second, *key) in found
        ]
        if pairs:
            cells = [difference(pairs, measure) for measure in COMPARED]
            lines.append(f"| {first}, less {second} | {len(pairs)} | {' | '.join(cells)} |")
    return lines


def attempts_table(results: list[Result]) -> list[str]:
    """The effect of more attempts a prompt: paired differences of runs that differ only in attempts and sizes."""
    accuracies = [f"{k} a step" for k in TOKENS_PER_STEP]
    points = ("base", "task", "method", "learning_rate", "seed", "num_problems")
    trained = [r for r in results if r["run"]["method"] != BASE]
    once = {tuple(r["run"][name] for name in points): r for r in trained if r["run"]["attempts"] == 1}
    rows = defaultdict(list)
    for result in trained:
        run = result["run"]
        partner = once.get(tuple(run[name] for name in points))
        if partner and run["attempts"] > 1:
            rows[run["task"], Path(run["base"]).name, run["method"], run["attempts"]].append((result, partner))
    if not rows:
        return []
    lines = [f"| attempts | pairs | {' | '.join(accuracies)} |", f"| --- |{' --- |' * (len(accuracies) + 1)}"]
    for (task, base, method, attempts), pairs in rows.items():
        cells = [difference(pairs, measure) for measure in accuracies]
        lines.append(f"| {task}, {base}, {method}: {attempts} less 1 | {len(pairs)} | {' | '.join(cells)} |")
    return ["### More attempts a prompt", "", *lines, ""]


def attention_table(results: list[Result]) -> list[str]:
    """Bases with full and with block-causal attention beside each other, on what the block-causal ones were run on."""
    attention = {r["run"]["base"]: f"blocks of {r['block_size']}" for r in results if r.get("block_size")}
    if not attention:
        return []
    point = itemgetter("task", "method", "attempts", "learning_rate")
    points = {point(r["run"]) for r in results if r["run"]["base"] in attention}
    rows = defaultdict(list)
    for result in results:
        run = result["run"]
        if point(run) in points:
            rows[run["task"], run["method"], run["base"]].append(result)
    columns = ["task", "method", "base", "attention", "seeds", *ATTENTION_MEASURES, "positions a token"]
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    methods, tasks = [BASE, *METHODS], list(dict.fromkeys(task for task, *_ in rows))
    for task, method, base in sorted(rows, key=lambda row: (tasks.index(row[0]), methods.index(row[1]))):
        runs = rows[task, method, base]
        cells = [cell(np.array([scores(run, measure) for run in runs])) for measure in ATTENTION_MEASURES]
        counted = rows[task, BASE, base][0].get("positions", {}).values()
        positions = ", ".join(f"{each:.2f}" for each in counted) or "not counted"
        names = [task, method, Path(base).name, attention.get(base, "full"), str(len(runs))]
        lines.append(f"| {' | '.join([*names, *cells, positions])} |")
    return ["### Full attention and block-causal attention", "", *lines, ""]


def difference(pairs: list[tuple[Result, Result]], measure: str) -> str:
    """`+2.9 ±0.5, 6 up`: the mean, its error, and in how many pairs the first is higher; one pair has no error."""
    values = np.array([scores(first, measure).mean() - scores(second, measure).mean() for first, second in pairs])
    over_pairs = f" ±{error(values):.1f}" if len(values) > 1 else ""
    return f"{values.mean():+.1f}{over_pairs}, {(values > 0).sum()} up"


def looks_of(methods: Collection[str]) -> dict[str, dict[str, Any]]:
    """The methods that a picture shows, and how."""
    return dict(zip([name for name in PICTURED if name in methods], (TUNED, *OTHERS), strict=False))


def draw_paths(results: list[Result], group: Group, path: Path) -> None:
    """Plots accuracy on the weak task against the others during training, the mean over seeds and learning rates."""
    methods = by_method(r for r in results if group_of(r) == group)
    base = base_of(results, next(iter(methods.values()))[0])
    with picture(path) as figure:
        axes = figure.subplots()
        for name, look in looks_of(methods).items():
            points = np.mean([path_of(base, run) for run in methods[name]], axis=0)
            axes.plot(*points.T, label=name, **look)
        axes.plot(*points_of(base), label=BASE, **BASE_LOOK | {"markersize": 10, "linestyle": "", "zorder": 3})
        axes.set_title("What training gains, and what it forgets", fontsize=12)
        axes.set_xlabel("accuracy on the other tasks, %")
        axes.set_ylabel(f"accuracy on {group.task}, %")
        legend_below(figure)


def path_of(base: Result, run: Result) -> list[tuple[float, float]]:
    """Points of the picture from the base to the end of the training."""
    between = [
        tuple(
            digits_of("".join(r for name, r in right.items() if (name == "1 a step") == is_weak)).mean()
            for is_weak in (False, True)
        )
        for right in run["path"].values()
    ]
    return [points_of(base), *between, points_of(run)]


def points_of(result: Result) -> tuple[float, float]:
    """The other tasks and the weak one, percent."""
    return scores(result, "other tasks").mean(), scores(result, "1 a step").mean()


def digits_of(right: str) -> np.ndarray:
    """0 or 100 for each problem."""
    return 100 * np.array([int(digit) for digit in right])


def draw_passes(results: list[Result], group: Group, path: Path) -> None:
    """Accuracy against the tokens a forward pass of an adaptive policy; means over seeds and learning rates."""
    methods = by_method(r for r in results if group_of(r) == group)
    methods[BASE] = [base_of(results, next(iter(methods.values()))[0])]
    with picture(path) as figure:
        axes = figure.subplots()
        for name, look in {BASE: BASE_LOOK, **looks_of(methods)}.items():
            axes.plot(*np.mean([sorted(curve(run)) for run in methods[name]], axis=0).T, label=name, **look)
        axes.set_title("What several tokens a step cost", fontsize=12)
        axes.set_xlabel("tokens a forward pass")
        axes.set_ylabel(f"accuracy on {group.task}, %")
        legend_below(figure)


def report(path: Path) -> None:
    """Writes tables.md and the two pictures of the first group beside results.jsonl."""
    results = list(finished_lines(path))
    (path.parent / "tables.md").write_text(tables(results))
    [first, *_] = groups_of(results)
    draw_paths(results, first, path.parent / "paths.png")
    draw_passes(results, first, path.parent / "passes.png")
