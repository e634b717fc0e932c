"""`tabom evaluate`: accuracy, pass@k, order of certainty and cost of one or several models."""

from dataclasses import replace
from pathlib import Path

from tabom.cli.commands import EvaluateArguments, ModelsArguments
from tabom.cli.model import load_to_sample
from tabom.cli.prompts import read
from tabom.data.json_files import write_json
from tabom.data.prompts import PromptSet
from tabom.evaluation.accuracy_picture import draw
from tabom.evaluation.compare import compare, comparison_table, results_table
from tabom.evaluation.config import EvaluateConfig
from tabom.evaluation.evaluate import Cell, evaluate
from tabom.lab.tasks import make_task
from tabom.models.loading import check_is_there
from tabom.models.writing import aside
from tabom.sampling.answerable import remarks_on
from tabom.sampling.config import EngineConfig, SamplerConfig, parse_sampler


def run(
    arguments: EvaluateArguments,
    config: EvaluateConfig,
    model_arguments: ModelsArguments,
    sampler: SamplerConfig,
    engine: EngineConfig,
) -> None:
    """Evaluates every cell and writes the results, their table and picture, and the comparisons with the first."""
    models = list(dict.fromkeys(model_arguments.model or ["shipped"]))
    for name in models:
        check_is_there(name)
    samplers = {text: parse_sampler(text, sampler) for text in arguments.samplers or []} or {"default": sampler}
    prompt_sets = read_prompt_sets(arguments)

    results = []
    for name in models:
        model = load_to_sample(replace(model_arguments, model=name))
        for prompts, length in prompt_sets:
            for remark in remarks_on(model, prompts, config.max_prompt_length):
                print(f"{name}, {remark}")
            for label, settings in samplers.items():
                cell = Cell(name, prompts.name, label)
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
    base, *others = models
    written = []
    for tuned in others:
        comparisons = [
            compare(Cell(base, prompts.name, label), Cell(tuned, prompts.name, label), folder)
            for prompts, _ in prompt_sets
            for label in samplers
        ]
        written.append({"base": base, "tuned": tuned, "comparisons": comparisons})
        tables += (
            f"\n{tuned} (tuned) against {base} (base), errors paired by problem:\n\n{comparison_table(comparisons)}"
        )
    if written:
        write_json(folder / "comparison.json", written)
    with aside(folder / "results.md") as part:
        part.write_text(tables, encoding="utf-8")
    print(tables)
    with aside(folder / "results.png") as part:
        draw(results, part)
    print(f"{folder}: results.json, results.md, results.png; the responses in a folder for each cell")


def read_prompt_sets(arguments: EvaluateArguments) -> list[tuple[PromptSet, int | None]]:
    """The tasks', then the files' prompts, each with the tokens of its responses if the task knows them."""
    sets = []
    for task in map(make_task, arguments.task or []):
        prompts = task.prompt_set(arguments.num_prompts or 500, arguments.split or "test", arguments.prompt_seed)
        sets.append((prompts, task.response_length))
    for source in arguments.prompts or []:
        prompts = read(arguments, source, default_split="test")
        sets.append((prompts.first(arguments.num_prompts) if arguments.num_prompts else prompts, None))
    if not sets:
        raise ValueError("prompts=None, task=None: give at least one prompt set")
    names = [prompts.name for prompts, _ in sets]
    if len(set(names)) < len(names):
        raise ValueError(f"prompts={arguments.prompts}: two sets have the same name; rename a file")
    return sets
