"""`tabom train`: post-trains on trajectories."""

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from datasets import Dataset, concatenate_datasets
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, set_seed

from tabom.cli.commands import AdapterArguments, DataArguments, ModelArguments
from tabom.cli.model import load_model
from tabom.data.progress import Lines
from tabom.data.prompts import PromptReader, PromptSet, read_prompts
from tabom.data.sources import REJECTED, open_records
from tabom.data.tokenized import tokenize
from tabom.lab.dry_run import dry_run, random_model, train_only
from tabom.models.diffusion_model import DiffusionModel
from tabom.models.writing import naming_full_disk
from tabom.sampling.config import SamplerConfig, parse_sampler
from tabom.training.config import TabomConfig
from tabom.training.trainer import TabomTrainer

if TYPE_CHECKING:
    from peft import LoraConfig


def run(
    arguments: DataArguments, adapter: AdapterArguments, model_arguments: ModelArguments, config: TabomConfig
) -> None:
    """Trains and saves a model, or makes the dry run of `--dry_run`."""
    if (arguments.data is None) != arguments.dry_run:
        raise ValueError(f"data={arguments.data!r}, dry_run={arguments.dry_run}: give exactly one of them")
    if model_arguments.adapt and adapter.use_peft:
        raise ValueError(
            "adapt=True with use_peft=True: an adapter does not train the new mask token; train all weights, or adapt "
            "and save the model first (tabom.load)"
        )
    if arguments.with_rejected and config.objective != "policy":
        raise ValueError(
            f"with_rejected=True with objective={config.objective!r}: it would learn the wrong responses like right "
            "ones; only policy learns from both"
        )
    set_seed(config.seed)
    if arguments.dry_run:
        dry_run_of(arguments, adapter, model_arguments, config)
        return
    callbacks = check_evaluation(arguments, config)
    callbacks += progress_callbacks(config)
    check_data(arguments, config)
    eval_prompts = read_eval_prompts(config)
    diffusion_model = load_model(model_arguments)
    trainer = TabomTrainer(
        model=diffusion_model.model,
        args=config,
        train_dataset=read_data(arguments.data, arguments.split, arguments, diffusion_model, config),
        eval_dataset=arguments.eval_data
        and read_data(arguments.eval_data, arguments.eval_split, arguments, diffusion_model, config),
        eval_prompts=eval_prompts,
        eval_sampler=parse_sampler(config.eval_sampler, SamplerConfig()) if config.eval_sampler else None,
        callbacks=callbacks,
        processing_class=diffusion_model.tokenizer,
        peft_config=lora_config(adapter) if adapter.use_peft else None,
    )
    resume = config.resume_from_checkpoint
    trainer.train(resume_from_checkpoint={"true": True, "false": None}.get(str(resume).lower(), resume))
    with naming_full_disk(config.output_dir):
        trainer.save_model()
        trainer.save_state()  # the training curves of `tabom report`, also where no checkpoint is kept
        trainer.create_model_card()
    print(f"saved to {config.output_dir}" + (f", pushed to {trainer.hub_model_id}" if config.push_to_hub else ""))


def progress_callbacks(config: TabomConfig) -> list[TrainerCallback]:
    """What shows the progress where the output is no terminal, in place of the bar."""
    if sys.stderr.isatty() or config.disable_tqdm:
        return []
    config.disable_tqdm = True
    return [ProgressLines()]


class ProgressLines(TrainerCallback):
    """Says every half minute how far a training is, where a bar would fill a log file."""

    def on_train_begin(self, args: TabomConfig, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.lines = Lines()
        if state.is_world_process_zero:
            self.lines.begin("training steps", state.max_steps, state.global_step)

    def on_step_end(self, args: TabomConfig, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.lines.update(state.global_step, "training steps")

    def on_train_end(self, args: TabomConfig, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.lines.ended.set()


def check_evaluation(arguments: DataArguments, config: TabomConfig) -> list[TrainerCallback]:
    """The callbacks of early stopping.

    Raises:
        ValueError: there is something to evaluate but no evaluation strategy, or the reverse.
    """
    is_anything = arguments.eval_data is not None or config.eval_prompts is not None
    if is_anything != (config.eval_strategy != "no"):
        raise ValueError(
            f"eval_data={arguments.eval_data!r}, eval_prompts={config.eval_prompts!r} with "
            f"eval_strategy={config.eval_strategy.value!r}: give --eval_strategy steps or epoch together with what is "
            "evaluated"
        )
    if arguments.early_stopping_patience is None:
        return []
    if not config.load_best_model_at_end:
        raise ValueError(
            f"early_stopping_patience={arguments.early_stopping_patience}: needs --load_best_model_at_end true"
        )
    return [EarlyStoppingCallback(arguments.early_stopping_patience)]


def check_data(arguments: DataArguments, config: TabomConfig) -> None:
    """Opens the data before a model of many gigabytes is loaded, so that errors show early.

    Raises:
        ValueError, OSError: there is no such source or split.
    """
    with config.main_process_first(desc="opening the data"):
        for source, split in ((arguments.data, arguments.split), (arguments.eval_data, arguments.eval_split)):
            if source is not None:
                open_records(source, split, arguments.config_name, default_split="train")


def read_eval_prompts(config: TabomConfig) -> PromptSet | None:
    """The prompts of the evaluations during training."""
    if config.eval_prompts is None:
        return None
    prompts, _ = read_prompts(config.eval_prompts, reader=PromptReader(verifier=config.eval_verifier))
    return prompts.first(config.eval_num_prompts) if config.eval_num_prompts else prompts


def read_data(
    source: str, split: str | None, arguments: DataArguments, diffusion_model: DiffusionModel, config: TabomConfig
) -> Dataset:
    """The trajectories of a source, and its rejected ones if asked for, tokenized; prints how many there are."""
    tables = []
    for each in (source, source + REJECTED) if arguments.with_rejected else (source,):
        with config.main_process_first(desc="tokenizing"):  # the other processes read them from the cache
            table, invalid = tokenize(
                each,
                diffusion_model.tokenizer,
                diffusion_model.model.config.vocab_size,
                split=split,
                config_name=arguments.config_name,
                method=arguments.method,
                skip_invalid=arguments.skip_invalid,
                **config.tokenizing_settings(diffusion_model),
            )
        print(f"{each}: {len(table)} trajectories, {invalid} invalid lines left out")
        tables.append(table)
    return concatenate_datasets(tables)


def dry_run_of(
    arguments: DataArguments, adapter: AdapterArguments, model_arguments: ModelArguments, config: TabomConfig
) -> None:
    """The dry run of `--dry_run`."""
    if arguments.scale == "full" and config.device.type == "cpu":
        raise ValueError("dry_run=True with scale='full': no GPU; --scale tiny runs on a CPU")
    diffusion_model = random_model(
        model_arguments.model,
        arguments.scale,
        getattr(torch, model_arguments.dtype),
        model_arguments.attn_implementation,
        config.device,
    )
    peft_config = None
    if adapter.use_peft and find_spec("peft"):
        peft_config = lora_config(adapter)
    elif adapter.use_peft:
        layers = adapter.lora_target_modules
        print(f"peft is not installed: {', '.join(layers)} are trained themselves, in place of an adapter on them")
        train_only(diffusion_model.model, layers)
    dry_run(diffusion_model, config, peft_config)


def lora_config(adapter: AdapterArguments) -> "LoraConfig":
    """The adapter that `--use_peft` asks for."""
    from peft import LoraConfig

    return LoraConfig(
        r=adapter.lora_r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        target_modules=adapter.lora_target_modules,
    )
