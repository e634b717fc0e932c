"""`tabom quickstart`: the whole path on the shipped model, from its first answers to a table of what training did."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.utils import logging

from tabom.data.prompts import PromptSet
from tabom.data.trajectories import Trajectory, read_trajectories
from tabom.evaluation.answers import accuracy, answer, grade, sampled_pass_at
from tabom.evaluation.metrics import entropy_by_step
from tabom.evaluation.replay import order_accuracy
from tabom.lab.model import BASE_PATH
from tabom.lab.report import (
    PASS_AT,
    Scores,
    draw_accuracy_against_retention,
    draw_entropy_by_step,
    print_table,
    print_verdicts,
)
from tabom.lab.tasks import Addition, Reversing, Sorting, Subtraction, Sudoku
from tabom.models.diffusion_model import DiffusionModel
from tabom.models.loading import load
from tabom.sampling.collect import CollectConfig, collect
from tabom.sampling.sampler import SamplerConfig
from tabom.training.trainer import TabomConfig, TabomTrainer

WEAK_TASK = Subtraction()
OTHER_TASKS = (Addition(), Sorting(), Reversing(), Sudoku(givens=6))


@dataclass
class QuickstartConfig:
    """Sizes of the quickstart; the defaults take one and a half minutes on two CPU cores."""

    output_dir: str = field(default="runs/quickstart", metadata={"help": "Where everything is written."})
    model: str | None = field(
        default=None, metadata={"help": "The base. Default: the model that ships with the package."}
    )
    num_prompts: int = field(default=2000, metadata={"help": "Prompts answered to collect trajectories."})
    num_problems: int = field(default=500, metadata={"help": "Held-out problems of the weak task."})
    num_other_problems: int = field(default=200, metadata={"help": "Held-out problems of each other task."})
    num_pass_problems: int = field(default=150, metadata={"help": "Held-out problems sampled 16 times for pass@k."})
    sampling_temperature: float = field(default=1.0, metadata={"help": "Of the samples for pass@k."})
    max_steps: int = field(default=300, metadata={"help": "Training steps of each method."})
    batch_size: int = field(default=64, metadata={"help": "Trajectories a training step."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate of each method."})
    window: int = field(default=2, metadata={"help": "M = W, steps."})
    margin: float = field(default=0.1, metadata={"help": "Of the hinge, nats."})
    rank_weight: float = field(default=1.0, metadata={"help": "Weight of the rank loss."})
    seed: int = field(default=0, metadata={"help": "Of prompts, cuts and batches."})


def quickstart(config: QuickstartConfig) -> dict[str, Scores]:
    """Evaluates the base, collects trajectories, post-trains four ways, evaluates each and reports.

    Returns:
        method -> measure -> scores.
    """
    logging.disable_progress_bar()
    console = Console()
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)

    console.rule("1. Collect: right answers are kept with their decoding order")
    base = load(config.model or BASE_PATH)
    prompts = WEAK_TASK.prompt_set(config.num_prompts, "train", config.seed)
    trajectories = collect_trajectories(base, prompts, output / "trajectories.jsonl")
    held_out_prompts = WEAK_TASK.prompt_set(config.num_problems, "test", config.seed)
    held_out = collect_trajectories(base, held_out_prompts, output / "held_out.jsonl")
    console.print(
        f"{len(trajectories)} of {config.num_prompts} answers are right and kept; e.g. "
        f"{trajectories[0].prompt}{trajectories[0].response} in the order {trajectories[0].decoding_order}"
    )

    console.rule("2. Post-train: four methods, each from the base, same number of steps")
    truth = ground_truth(base, prompts)
    models = {"base": base}
    with Progress(console=console) as progress:
        for method, data, objective in (
            ("NELBO, ground truth", truth, "nelbo"),
            ("NELBO, trajectories", trajectories, "nelbo"),
            ("window CE", trajectories, "window"),
            ("TABOM", trajectories, "tabom"),
        ):
            bar = progress.add_task(f"{method:20}", total=config.max_steps)
            folder = output / method.lower().replace(", ", "-").replace(" ", "-")
            models[method] = post_train(config, data, objective, folder, lambda bar=bar: progress.advance(bar))

    console.rule("3. Evaluate on held-out problems")
    results: dict[str, Scores] = {}
    entropies: dict[str, np.ndarray] = {}
    with Progress(console=console) as progress:
        for method, model in models.items():
            bar = progress.add_task(f"{method:20}", total=max(PASS_AT) + len(OTHER_TASKS) + 4)
            advance = lambda bar=bar: progress.advance(bar)  # noqa: E731
            results[method], entropies[method] = evaluate(config, model, held_out, advance)

    console.rule("4. What it did")
    print_table(console, results)
    print_verdicts(console, results)
    draw_accuracy_against_retention(results, output / "accuracy_retention.png")
    draw_entropy_by_step(entropies, output / "entropy_by_step.png")
    save_results(config, results, entropies, output / "results.json")
    console.print(f"Everything is in {output}: results.json, two pictures, the trajectories, the models")
    return results


def collect_trajectories(base: DiffusionModel, prompts: PromptSet, path: Path) -> list[Trajectory]:
    """The right greedy answers of the base, one token a step, lowest entropy first."""
    sampler = SamplerConfig(max_new_tokens=WEAK_TASK.response_length)
    collect(base, prompts, sampler, CollectConfig(output=str(path), overwrite=True))
    trajectories, _ = read_trajectories(path, base.tokenizer, base.model.config.vocab_size)
    return trajectories


def ground_truth(base: DiffusionModel, prompts: PromptSet) -> list[Trajectory]:
    """The right answers to all prompts, also to those that the base answered wrongly."""
    trajectories = []
    for prompt, response in zip(prompts.prompts, prompts.answers, strict=True):
        token_ids = base.tokenizer(response, add_special_tokens=False).input_ids
        trajectories.append(Trajectory(prompt, response, token_ids, list(range(len(token_ids)))))
    return trajectories


class OnStep(TrainerCallback):
    """Calls back after every optimizer step."""

    def __init__(self, advance: Callable[[], None]) -> None:
        self.advance = advance

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self.advance()


def post_train(
    config: QuickstartConfig, data: list[Trajectory], objective: str, folder: Path, advance: Callable[[], None]
) -> DiffusionModel:
    """Trains a fresh copy of the base with `objective` and saves it to `folder`."""
    set_seed(config.seed)
    family = load(config.model or BASE_PATH)
    arguments = TabomConfig(
        output_dir=str(folder),
        objective=objective,
        supervised_window=config.window,
        rank_window=config.window,
        form="hinge",
        margin=config.margin,
        rank_weight=config.rank_weight,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        weight_decay=0.01,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,  # large enough for the tiny model, and the same figures on every machine
        seed=config.seed,
    )
    trainer = TabomTrainer(
        model=family.model,
        args=arguments,
        train_dataset=data,
        processing_class=family.tokenizer,
        callbacks=[OnStep(advance)],
    )
    trainer.remove_callback(PrinterCallback)  # the progress bar is enough
    trainer.train()
    trainer.save_model()
    family.model.eval()
    return family


def evaluate(
    config: QuickstartConfig, model: DiffusionModel, held_out: list[Trajectory], advance: Callable[[], None]
) -> tuple[Scores, np.ndarray]:
    """All measures of one model on held-out problems, and its entropy by decode step."""
    prompts = WEAK_TASK.prompt_set(config.num_problems, "test", config.seed)
    sampler = SamplerConfig(max_new_tokens=WEAK_TASK.response_length)
    scores: Scores = {}
    completions = {k: answer(model, prompts, replace(sampler, tokens_per_step=k)) for k in (1, 2, 4)}
    for tokens_per_step, answers in completions.items():
        scores[f"{tokens_per_step} a step"] = grade(model, prompts, answers)
        advance()
    retained = []
    for task in OTHER_TASKS:
        others = task.prompt_set(config.num_other_problems, "test", config.seed)
        retained.append(accuracy(model, others, SamplerConfig(max_new_tokens=task.response_length)))
        scores[task.name] = retained[-1]
        advance()
    scores["retention"] = np.concatenate(retained)
    sampled = prompts.first(config.num_pass_problems)
    drawn = replace(sampler, temperature=config.sampling_temperature)
    for k, estimates in sampled_pass_at(PASS_AT, model, sampled, drawn, advance).items():
        scores[f"pass@{k}"] = estimates
    scores["pair order"] = order_accuracy(model, held_out)
    advance()
    orders, entropies = zip(*((each.decoding_order, each.entropy) for each in completions[1]), strict=True)
    return scores, entropy_by_step(orders, entropies)


def save_results(
    config: QuickstartConfig, results: dict[str, Scores], entropies: dict[str, np.ndarray], path: Path
) -> None:
    """Means of every measure, with the settings, as JSON."""
    means = {method: {name: float(s.mean()) for name, s in scores.items()} for method, scores in results.items()}
    document = {
        "config": asdict(config),
        "means": means,
        "entropy_by_step": {method: values.tolist() for method, values in entropies.items()},
    }
    path.write_text(json.dumps(document, indent=2) + "\n")
