"""The `tabom` command."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

USAGE = """usage: tabom COMMAND [--config FILE.yaml] [--any-field value]

  generate      answer prompts; --animate shows the tokens appear
  collect       answer a prompt set and keep the right answers with their decoding order
  train         post-train on trajectories; --recipe NAME as published
  quickstart    the whole path on the model that ships with the package, in about two minutes
  lab pretrain  make that model again, from nothing

`tabom COMMAND --help` lists the fields of a command."""


@dataclass
class ModelArguments:
    """Which model."""

    model: str | None = field(
        default=None,
        metadata={"help": "Folder or hub name. Default: the tiny model that ships with the package."},
    )
    adapt: bool = field(
        default=False,
        metadata={"help": "Turn an autoregressive Qwen2, Qwen3 or Llama into a diffusion language model."},
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Of the weights in memory."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, flash_attention_2 or eager. Default: transformers' choice."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


@dataclass
class GenerateArguments:
    """What `tabom generate` answers and how it shows it."""

    prompt: list[str] = field(metadata={"help": "One or more prompts."})
    animate: bool = field(default=False, metadata={"help": "Show the tokens appear, step by step."})
    color_by: Literal["step", "certainty"] = field(
        default="step", metadata={"help": "What the colours of the animation mean."}
    )


@dataclass
class PromptArguments:
    """Which prompts `tabom collect` answers: a task of the lab, or a file."""

    task: str | None = field(default=None, metadata={"help": "addition, subtraction, sorting, reversing or sudoku."})
    givens: int = field(default=8, metadata={"help": "Cells of the sudoku that are given."})
    num_prompts: int = field(default=1000, metadata={"help": "Prompts drawn from the task."})
    split: Literal["train", "test"] = field(default="train", metadata={"help": "Split of the task's prompts."})
    prompt_seed: int = field(default=0, metadata={"help": "Draws the task's prompts."})
    prompts: str | None = field(
        default=None, metadata={"help": "JSONL file with a prompt and an optional answer a line."}
    )
    skip_invalid: bool = field(default=False, metadata={"help": "Count and skip lines that do not parse."})


@dataclass
class DataArguments:
    """What `tabom train` learns from, and whether by an adapter."""

    data: str | None = field(default=None, metadata={"help": "JSONL file of trajectories."})
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


def generate(argv: Sequence[str]) -> None:
    """Answers prompts."""
    from rich.console import Console

    from tabom.animation import animate
    from tabom.arguments import parse_arguments
    from tabom.encoding import encode_prompt
    from tabom.sampler import SamplerConfig, decode_response, sample

    types = (GenerateArguments, ModelArguments, SamplerConfig)
    arguments, model_arguments, sampler = parse_arguments(types, argv, "tabom generate", "Answer prompts.")
    model = load_to_sample(model_arguments)
    console = Console(highlight=False)
    if arguments.animate:
        for prompt in arguments.prompt:
            animate(model, prompt, sampler, arguments.color_by, console)
        return
    encoded = [encode_prompt(model.tokenizer, prompt) for prompt in arguments.prompt]
    for completion in sample(model, encoded, sampler):
        console.print(decode_response(model, completion.token_ids), markup=False)


def collect(argv: Sequence[str]) -> None:
    """Collects verified trajectories."""
    from tabom.arguments import parse_arguments
    from tabom.collect import CollectConfig
    from tabom.collect import collect as run
    from tabom.lab.tasks import make_task
    from tabom.prompts import read_prompts
    from tabom.sampler import SamplerConfig

    types = (PromptArguments, ModelArguments, SamplerConfig, CollectConfig)
    arguments, model_arguments, sampler, config = parse_arguments(
        types,
        argv,
        "tabom collect",
        "Answer a prompt set and keep the right answers with their decoding order.",
    )
    if (arguments.task is None) == (arguments.prompts is None):
        raise ValueError(f"task={arguments.task!r}, prompts={arguments.prompts!r}: give exactly one of them")
    if config.samples_per_prompt > 1 and not sampler.is_random:
        raise ValueError(
            f"samples_per_prompt={config.samples_per_prompt} with temperature=0: all samples of a prompt would be the "
            "same; give --temperature or --alg_temp above 0, or a random --policy"
        )
    if arguments.task is not None:
        task = make_task(arguments.task, **({"givens": arguments.givens} if arguments.task == "sudoku" else {}))
        prompts = task.prompt_set(arguments.num_prompts, arguments.split, arguments.prompt_seed)
        sampler.max_new_tokens = sampler.max_new_tokens or task.response_length
    else:
        prompts, invalid = read_prompts(arguments.prompts, skip_invalid=arguments.skip_invalid)
        if invalid:
            print(f"{arguments.prompts}: {invalid} invalid lines left out")
    report = run(load_to_sample(model_arguments), prompts, sampler, config)
    print(f"{config.output}: {report.correct} right of {report.attempts} attempts ({report.new_attempts} made now)")


def train(argv: Sequence[str]) -> None:
    """Post-trains on trajectories."""
    from transformers import set_seed

    from tabom.arguments import parse_arguments
    from tabom.trainer import TabomConfig, TabomTrainer
    from tabom.trajectories import read_trajectories

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
            "and save the model first (tabom.models.load)"
        )
    set_seed(config.seed)
    if arguments.random_weights:
        random_weights_run(arguments, model_arguments, config)
        return
    family = load_model(model_arguments)
    trajectories, invalid = read_trajectories(
        arguments.data,
        family.tokenizer,
        family.model.config.vocab_size,
        method=arguments.method,
        skip_invalid=arguments.skip_invalid,
    )
    print(f"{arguments.data}: {len(trajectories)} trajectories, {invalid} invalid lines left out")
    trainer = TabomTrainer(
        model=family.model,
        args=config,
        train_dataset=trajectories,
        processing_class=family.tokenizer,
        peft_config=lora_config(arguments) if arguments.use_peft else None,
    )
    resume = config.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume in ("true", "True") else resume)
    trainer.save_model()
    print(f"saved to {config.output_dir}")


def random_weights_run(
    arguments: DataArguments,
    model_arguments: ModelArguments,
    config: "tabom.trainer.TabomConfig",  # noqa: F821
) -> None:
    """The dry run of `--random-weights`."""
    import torch

    from tabom.dry_run import dry_run, random_model

    if arguments.scale == "full" and config.device.type == "cpu":
        raise ValueError("random_weights=True with scale='full': no GPU; --scale tiny runs on a CPU")
    family = random_model(
        model_arguments.model,
        arguments.scale,
        getattr(torch, model_arguments.dtype),
        model_arguments.attn_implementation,
        config.device,
    )
    dry_run(family, config, lora_config(arguments) if arguments.use_peft else None)


def lora_config(arguments: DataArguments) -> "peft.LoraConfig":  # noqa: F821
    """The adapter that `--use_peft` asks for."""
    from peft import LoraConfig

    return LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=arguments.lora_target_modules,
    )


def quickstart(argv: Sequence[str]) -> None:
    """Runs the whole path on the shipped model."""
    from tabom.arguments import parse_arguments
    from tabom.lab.quickstart import QuickstartConfig
    from tabom.lab.quickstart import quickstart as run

    (config,) = parse_arguments((QuickstartConfig,), argv, "tabom quickstart", "The whole path, small.")
    run(config)


def lab_pretrain(argv: Sequence[str]) -> None:
    """Makes the shipped model from nothing."""
    from tabom.arguments import parse_arguments
    from tabom.lab.pretrain import PretrainConfig, pretrain

    (config,) = parse_arguments(
        (PretrainConfig,), argv, "tabom lab pretrain", "Pre-train the model that ships with the package."
    )
    print(f"saved to {pretrain(config)}")


def load_model(arguments: ModelArguments) -> "tabom.models.DiffusionModel":  # noqa: F821
    """The model of the command line."""
    import torch

    from tabom.lab.model import BASE_PATH
    from tabom.models import load

    return load(
        arguments.model or BASE_PATH,
        dtype=getattr(torch, arguments.dtype),
        attn_implementation=arguments.attn_implementation,
        adapt=arguments.adapt,
        trust_remote_code=arguments.trust_remote_code,
    )


def load_to_sample(arguments: ModelArguments) -> "tabom.models.DiffusionModel":  # noqa: F821
    """The model of the command line, on the GPU where there is one; a trainer moves it to its own."""
    import torch

    family = load_model(arguments)
    family.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return family


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "generate": generate,
    "collect": collect,
    "train": train,
    "quickstart": quickstart,
    "lab pretrain": lab_pretrain,
}


EXTRAS = {"matplotlib": "plot", "peft": "lora"}
"""Packages that the core install leaves out, and the extra that brings each."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; wrong input ends with one line on stderr and status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    words = 2 if argv[:1] == ["lab"] else 1
    name = " ".join(argv[:words])
    if name in ("", "-h", "--help", "help"):
        print(USAGE)
        return 0
    if name not in COMMANDS:
        print(f"tabom: unknown command {name!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    try:
        COMMANDS[name](argv[words:])
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in EXTRAS:
            raise
        print(f"tabom {name}: error: needs {package}; pip install 'tabom[{EXTRAS[package]}]'", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"tabom {name}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
