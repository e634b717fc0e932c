"""`tabom train`: post-trains on trajectories."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed

from tabom.cli.arguments import parse_arguments
from tabom.cli.model import ModelArguments, load_model
from tabom.data.prompts import PromptReader, PromptSet, read_prompts
from tabom.data.sources import open_records
from tabom.data.tokenized import tokenize
from tabom.lab.dry_run import dry_run, random_model, train_only
from tabom.models.diffusion_model import DiffusionModel
from tabom.sampling.policies import check_at_least
from tabom.sampling.sampler import SamplerConfig, parse_sampler
from tabom.training.config import TabomConfig
from tabom.training.trainer import TabomTrainer

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass
class DataArguments:
    """What is learnt from, and whether by an adapter."""

    data: str | None = field(
        default=None,
        metadata={"help": "Trajectories: JSONL, JSON, Parquet or CSV file, folder of `datasets`, or hub name."},
    )
    eval_data: str | None = field(
        default=None, metadata={"help": "Trajectories whose loss is evaluated; see --eval_strategy."}
    )
    split: str | None = field(default=None, metadata={"help": "Split of a folder or hub name. Default: train."})
    eval_split: str | None = field(default=None, metadata={"help": "The same, of eval_data."})
    config_name: str | None = field(default=None, metadata={"help": "Configuration of a hub name, such as `main`."})
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after this many evaluations without a better one; needs --load_best_model_at_end."},
    )
    method: list[str] | None = field(
        default=None, metadata={"help": "Keep only the records of these methods. Default, and `all`: every record."}
    )
    skip_invalid: bool = field(default=False, metadata={"help": "Count and skip lines that do not parse."})
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the adapter."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the adapter."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"], metadata={"help": "Layers that get an adapter."}
    )
    random_weights: bool = field(
        default=False,
        metadata={"help": "Dry run: the model's architecture with random weights, on made-up data, to see its cost."},
    )
    scale: Literal["full", "tiny"] = field(default="full", metadata={"help": "Size of the dry run's model."})

    def __post_init__(self) -> None:
        for name in ("early_stopping_patience", "lora_r", "lora_alpha"):
            check_at_least(name, getattr(self, name), 1)
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout}: expected a share in [0, 1)")


def run(argv: Sequence[str]) -> None:
    """Trains and saves, or makes the dry run of `--random-weights`."""
    types = (DataArguments, ModelArguments, TabomConfig)
    arguments, model_arguments, config = parse_arguments(
        types, argv, "tabom train", "Post-train on trajectories.", takes_recipe=True
    )
    if (arguments.data is None) != arguments.random_weights:
        raise ValueError(
            f"data={arguments.data!r}, random_weights={arguments.random_weights}: give exactly one of them"
        )
    if model_arguments.adapt and arguments.use_peft:
        raise ValueError(
            "adapt=True with use_peft=True: an adapter does not train the new mask token; train all weights, or adapt "
            "and save the model first (tabom.load)"
        )
    set_seed(config.seed)
    if arguments.random_weights:
        random_weights_run(arguments, model_arguments, config)
        return
    callbacks = check_evaluation(arguments, config)
    check_data(arguments, config)
    eval_prompts = read_eval_prompts(config)
    family = load_model(model_arguments)
    trainer = TabomTrainer(
        model=family.model,
        args=config,
        train_dataset=read_data(arguments.data, arguments.split, arguments, family, config),
        eval_dataset=arguments.eval_data
        and read_data(arguments.eval_data, arguments.eval_split, arguments, family, config),
        eval_prompts=eval_prompts,
        eval_sampler=parse_sampler(config.eval_sampler, SamplerConfig()) if config.eval_sampler else None,
        callbacks=callbacks,
        processing_class=family.tokenizer,
        peft_config=lora_config(arguments) if arguments.use_peft else None,
    )
    resume = config.resume_from_checkpoint
    trainer.train(resume_from_checkpoint={"true": True, "false": None}.get(str(resume).lower(), resume))
    trainer.save_model()
    trainer.create_model_card()
    print(f"saved to {config.output_dir}" + (f", pushed to {trainer.hub_model_id}" if config.push_to_hub else ""))


def check_evaluation(arguments: DataArguments, config: TabomConfig) -> list[TrainerCallback]:
    """The callbacks of early stopping.

    Raises:
        ValueError: there is something to evaluate but no moment to do it, or a moment but nothing.
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
    """Opens what is trained and evaluated on, before a model of many gigabytes is loaded in vain.

    Raises:
        ValueError, OSError: there is no such source or split.
    """
    with config.main_process_first(desc="opening the data"):
        for source, split in ((arguments.data, arguments.split), (arguments.eval_data, arguments.eval_split)):
            if source is not None:
                open_records(source, split, arguments.config_name, default_split="train")


def read_eval_prompts(config: TabomConfig) -> PromptSet | None:
    """The prompts that are answered during training."""
    if config.eval_prompts is None:
        return None
    prompts, _ = read_prompts(config.eval_prompts, reader=PromptReader(verifier=config.eval_verifier))
    return prompts.first(config.eval_num_prompts) if config.eval_num_prompts else prompts


def read_data(
    source: str, split: str | None, arguments: DataArguments, family: DiffusionModel, config: TabomConfig
) -> Dataset:
    """The trajectories of a source, tokenized; says how many, and how many were left out."""
    with config.main_process_first(desc="tokenizing"):  # the others find them in the cache
        table, invalid = tokenize(
            source,
            family.tokenizer,
            family.model.config.vocab_size,
            split=split,
            config_name=arguments.config_name,
            method=arguments.method,
            skip_invalid=arguments.skip_invalid,
            **config.tokenizing_settings(family.pad_token_id),
        )
    print(f"{source}: {len(table)} trajectories, {invalid} invalid lines left out")
    return table


def random_weights_run(arguments: DataArguments, model_arguments: ModelArguments, config: TabomConfig) -> None:
    """The dry run of `--random-weights`."""
    if arguments.scale == "full" and config.device.type == "cpu":
        raise ValueError("random_weights=True with scale='full': no GPU; --scale tiny runs on a CPU")
    family = random_model(
        model_arguments.model,
        arguments.scale,
        getattr(torch, model_arguments.dtype),
        model_arguments.attn_implementation,
        config.device,
    )
    peft_config = None
    if arguments.use_peft and find_spec("peft"):
        peft_config = lora_config(arguments)
    elif arguments.use_peft:
        layers = arguments.lora_target_modules
        print(f"peft is not installed: {', '.join(layers)} are trained themselves, in place of an adapter on them")
        train_only(family.model, layers)
    dry_run(family, config, peft_config)


def lora_config(arguments: DataArguments) -> "LoraConfig":
    """The adapter that `--use_peft` asks for."""
    from peft import LoraConfig

    return LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=arguments.lora_target_modules,
    )
