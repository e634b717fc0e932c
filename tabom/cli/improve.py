"""`tabom improve`: rounds of decoding, judging and training."""

from dataclasses import replace

from transformers import set_seed

from tabom.cli.commands import AdapterArguments, ModelArguments, PromptArguments
from tabom.cli.model import load_model
from tabom.cli.prompts import read, read_task
from tabom.cli.train import lora_config, progress_callbacks, read_eval_prompts
from tabom.models.loading import path_of
from tabom.rounds.config import ImproveConfig
from tabom.rounds.improve import Improvement
from tabom.rounds.records import newest_weights
from tabom.sampling.config import EngineConfig, SamplerConfig, parse_sampler
from tabom.training.config import TabomConfig
from tabom.training.trainer import TabomTrainer

REFUSED = {
    "eval_strategy": "a round is evaluated when it has ended, every eval_every rounds",
    "load_best_model_at_end": "the next round begins with the newest weights",
    "resume_from_checkpoint": "the same command always goes on where it stopped",
    "push_to_hub": "push the output_dir when the last round has ended",
}
"""Settings of transformers that would have no effect, or the wrong one, and why."""


def run(
    arguments: PromptArguments,
    model_arguments: ModelArguments,
    engine: EngineConfig,
    config: ImproveConfig,
    adapter: AdapterArguments,
    training: TabomConfig,
) -> None:
    """Makes the rounds and saves the last weights in the output folder."""
    for name, reason in REFUSED.items():
        if (value := getattr(training, name)) not in (None, False, "no"):
            raise ValueError(f"{name}={getattr(value, 'value', value)!r}: leave it out, because {reason}")
    sampler = parse_sampler(config.sampler, SamplerConfig())
    if arguments.task is not None and arguments.prompts is None:
        prompts, sampler = read_task(arguments, sampler, "train")
        held_out, _ = read_task(arguments, sampler, "test")
    elif arguments.prompts is not None and arguments.task is None:
        prompts, held_out = read(arguments, arguments.prompts, default_split="train"), None
    else:
        raise ValueError(f"task={arguments.task!r}, prompts={arguments.prompts!r}: give exactly one of them")
    eval_prompts = read_eval_prompts(training) if training.eval_prompts else held_out
    for name in ("eval_every", "eval_samples") if eval_prompts is None else ():
        if getattr(config, name) != 1:
            raise ValueError(f"{name}={getattr(config, name)} without eval_prompts: nothing is evaluated; give both")

    set_seed(training.seed)
    base = model_arguments.model or "shipped"
    weights = newest_weights(training.output_dir)
    diffusion_model = load_model(model_arguments if weights is None else replace(model_arguments, model=str(weights)))
    diffusion_model.model.config._name_or_path = str(path_of(base))  # the responses of a round note which model it is
    trainer = TabomTrainer(
        model=diffusion_model.model,
        args=training,
        processing_class=diffusion_model.tokenizer,
        callbacks=progress_callbacks(training),
        peft_config=lora_config(adapter) if adapter.use_peft and weights is None else None,
    )
    eval_sampler = (
        parse_sampler(training.eval_sampler, replace(sampler, temperature=0.0)) if training.eval_sampler else None
    )
    Improvement(trainer, prompts, config, sampler, engine, eval_prompts, eval_sampler).run()
    trainer.save_model()
    print(f"saved to {training.output_dir}; rounds.json holds the figures of all rounds")
