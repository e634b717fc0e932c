"""`tabom evaluate`: accuracy, pass@k, order of certainty and cost of one or several models."""

from dataclasses import replace
from pathlib import Path

from tabom.cli.commands import EvaluateArguments, ModelArguments
from tabom.cli.model import load_to_sample
from tabom.cli.prompts import read
from tabom.data.json_files import write_json
from tabom.data.prompts import PromptSet
from tabom.evaluation.compare import compare, comparison_table, draw, results_table
from tabom.evaluation.config import EvaluateConfig
from tabom.evaluation.evaluate import Cell, evaluate
from tabom.lab.tasks import make_task
from tabom.models.writing import aside
from tabom.sampling.config import EngineConfig, SamplerConfig, parse_sampler


def run(
    arguments: EvaluateArguments,
    model_arguments: ModelArguments,
    sampler: SamplerConfig,
    engine: EngineConfig,
    config: EvaluateConfig,
) -> None:
    """Evaluates every cell and writes results.json, results.md, and the comparison and pictures that are asked for."""
    models = list(dict.fromkeys([*(arguments.models or []), *(arguments.compare or [])])) or [model_arguments.model]
    samplers = {text: parse_sampler(text, sampler) for text in arguments.samplers or []} or {"default": sampler}
    prompt_sets = read_prompt_sets(arguments)

    results = []
    for name in models:
        model = load_to_sample(replace(model_arguments, model=name))
        for prompts, length in prompt_sets:
            for label, settings in samplers.items():
                cell = Cell(name or "shipped", prompts.name, label)
                settings = replace(settings, max_new_tokens=settings.max_new_tokens or length)
                results.append(evaluate(model, prompts, settings, config, cell, engine))
    if None in results:
        return  # the first process writes the results
    folder = Path(config.output_dir)
    write_json(folder / "results.json", results)
    for result in results:
        if result["reused"]:
            cell = ", ".join(result[name] for name in Cell._fields)
            print(f"{cell}: {result['reused']} of {result['answers']} responses were made by an earlier run")
    tables = results_table(results)
    if arguments.compare is not None:
        base, tuned = arguments.compare
        comparisons = [
            compare(Cell(base, prompts.name, label), Cell(tuned, prompts.name, label), folder)
            for prompts, _ in prompt_sets
            for label in samplers
        ]
        write_json(folder / "comparison.json", {"base": base, "tuned": tuned, "comparisons": comparisons})
        tables += (
            f"\n{tuned} (tuned) against {base} (base), errors paired by problem:\n\n{comparison_table(comparisons)}"
        )
    with aside(folder / "results.md") as part:
        part.write_text(tables, encoding="utf-8")
    print(tables)
    with aside(folder / "results.png") as part:
        draw(results, part)
    print(f"{folder}: results.json, results.md, results.png; the responses in a folder for each cell")


def read_prompt_sets(arguments: EvaluateArguments) -> list[tuple[PromptSet, int | None]]:
    """The tasks', then the files' prompts, each with the tokens of its responses if the task knows them."""
    sets = []
    for task in map(make_task, arguments.tasks or []):
        prompts = task.prompt_set(arguments.num_prompts or 500, arguments.split or "test", arguments.prompt_seed)
        sets.append((prompts, task.response_length))
    for source in arguments.prompts or []:
        prompts = read(arguments, source, default_split="test")
        sets.append((prompts.first(arguments.num_prompts) if arguments.num_prompts else prompts, None))
    if not sets:
        raise ValueError("prompts=None, tasks=None: give at least one prompt set")
    names = [prompts.name for prompts, _ in sets]
    if len(set(names)) < len(names):
        raise ValueError(f"prompts={arguments.prompts}: two sets have the same name; rename a file")
    return sets
