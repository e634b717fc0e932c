"""`tabom evaluate`: accuracy, pass@k, order of certainty and cost of one or several models."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tabom.cli.arguments import parse_arguments
from tabom.cli.model import ModelArguments, load_to_sample
from tabom.cli.prompts import ReadingArguments
from tabom.data.prompts import PromptSet
from tabom.evaluation.compare import compare, comparison_table, draw, results_table
from tabom.evaluation.evaluate import Cell, EvaluateConfig, evaluate, write_json
from tabom.lab.tasks import make_task
from tabom.sampling.engine import EngineConfig
from tabom.sampling.policies import check_at_least
from tabom.sampling.sampler import SamplerConfig, parse_sampler


@dataclass
class EvaluateArguments(ReadingArguments):
    """What is evaluated on what."""

    models: list[str] | None = field(default=None, metadata={"help": "Folders or hub names. Default: that of --model."})
    prompts: list[str] | None = field(
        default=None, metadata={"help": "JSONL, JSON, Parquet or CSV files, folders of `datasets`, or hub names."}
    )
    tasks: list[str] | None = field(default=None, metadata={"help": "Tasks of the lab, on held-out prompts."})
    num_prompts: int | None = field(
        default=None, metadata={"help": "The first so many of each prompt set; of a task 500 by default."}
    )
    prompt_seed: int = field(default=0, metadata={"help": "Draws the tasks' prompts."})
    samplers: list[str] | None = field(
        default=None,
        metadata={"help": "Settings as field=value,field=value, each a column of its own, on top of the others given."},
    )
    compare: list[str] | None = field(
        default=None, metadata={"help": "Two models, base and tuned: evaluates both and compares them in pairs."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("num_prompts", self.num_prompts, 1)

    def prompt_sets(self) -> list[PromptSet]:
        """The tasks', then the files' prompts."""
        sets = []
        for name in self.tasks or []:
            sets.append(make_task(name).prompt_set(self.num_prompts or 500, self.split or "test", self.prompt_seed))
        for source in self.prompts or []:
            prompts = self.read(source)
            sets.append(prompts.first(self.num_prompts) if self.num_prompts else prompts)
        if not sets:
            raise ValueError("prompts=None, tasks=None: give at least one prompt set")
        names = [prompts.name for prompts in sets]
        if len(set(names)) < len(names):
            raise ValueError(f"prompts={self.prompts}: two sets have the same name; rename a file")
        return sets


def run(argv: Sequence[str]) -> None:
    """Evaluates every cell and writes results.json, results.md, and the comparison and pictures that are asked for."""
    arguments, model_arguments, sampler, engine, config = parse_arguments(
        (EvaluateArguments, ModelArguments, SamplerConfig, EngineConfig, EvaluateConfig),
        argv,
        "tabom evaluate",
        "Answer prompt sets with one or several models and measure the answers; every answer is kept.",
    )
    if arguments.compare is not None and len(arguments.compare) != 2:
        raise ValueError(f"compare={arguments.compare}: expected two models, base and tuned")
    models = list(dict.fromkeys([*(arguments.models or []), *(arguments.compare or [])])) or [model_arguments.model]
    samplers = {text: parse_sampler(text, sampler) for text in arguments.samplers or []} or {"default": sampler}
    prompt_sets = arguments.prompt_sets()

    results = []
    for name in models:
        family = load_to_sample(replace(model_arguments, model=name))
        for prompts in prompt_sets:
            for label, settings in samplers.items():
                cell = Cell(name or "shipped", prompts.name, label)
                results.append(evaluate(family, prompts, settings, config, cell, engine))
    if None in results:
        return  # the first process writes the results
    folder = Path(config.output_dir)
    write_json(folder / "results.json", results)
    tables = results_table(results)
    if arguments.compare is not None:
        base, tuned = arguments.compare
        comparisons = [
            compare(Cell(base, prompts.name, label), Cell(tuned, prompts.name, label), folder)
            for prompts in prompt_sets
            for label in samplers
        ]
        write_json(folder / "comparison.json", {"base": base, "tuned": tuned, "comparisons": comparisons})
        tables += (
            f"\n{tuned} (tuned) against {base} (base), errors paired by problem:\n\n{comparison_table(comparisons)}"
        )
    (folder / "results.md").write_text(tables, encoding="utf-8")
    print(tables)
    draw(results, folder / "results.png")
    print(f"{folder}: results.json, results.md, results.png; the answers in a folder a cell")
