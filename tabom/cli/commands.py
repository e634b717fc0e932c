"""The commands and their arguments. Imports nothing slow, so that `--help` and errors in arguments are fast."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from tabom.data.sources import READERS
from tabom.evaluation.config import EvaluateConfig
from tabom.lab.config import PlanConfig, PretrainConfig, QuickstartConfig, StudyConfig
from tabom.rounds.config import ImproveConfig
from tabom.sampling.config import CollectConfig, EngineConfig, SamplerConfig, check_at_least, check_output_file
from tabom.training.settings import TabomSettings


def check_file(name: str, value: str | None) -> None:
    """Raises a FileNotFoundError if an argument names a file by its suffix and there is none."""
    if value is not None and Path(value).suffix in (".jsonl", *READERS) and not Path(value).exists():
        raise FileNotFoundError(f"{name}={value}: no such file")


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
        default=None,
        metadata={
            "help": "sdpa, flash_attention_2, eager or, on a GPU, flex_attention. Default: transformers' choice."
        },
    )
    block_size: int | None = field(
        default=None,
        metadata={"help": "Tokens of a block of block-causal attention, where config.json does not say it."},
    )
    mask_token_id: int | None = field(default=None, metadata={"help": "Where config.json does not say it."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


@dataclass
class ModelsArguments(ModelArguments):
    """Which models."""

    model: list[str] | None = field(
        default=None,
        metadata={
            "help": "Folders or hub names; the first is the base that the others are compared with. Default: the tiny "
            "model that ships with the package."
        },
    )


@dataclass
class ReadingArguments:
    """How prompts are read and answers judged."""

    split: str | None = field(
        default=None,
        metadata={
            "help": "Split of a task, a data set or a hub name. Default: the only one, or train to collect and test to "
            "evaluate."
        },
    )
    config_name: str | None = field(default=None, metadata={"help": "Configuration of a hub name, such as `main`."})
    prompt_column: str | None = field(default=None, metadata={"help": "Field of the prompt, if not a known one."})
    answer_column: str | None = field(default=None, metadata={"help": "Field of the answer, if not a known one."})
    prompt_template: str | None = field(
        default=None, metadata={"help": "Text file with {prompt} in it, which every prompt is put into."}
    )
    system_prompt: str | None = field(default=None, metadata={"help": "Opens every conversation."})
    verifier: str | None = field(
        default=None,
        metadata={
            "help": "exact, contains, regex, math, code, or python:module.function. Default: by the shape of the data."
        },
    )
    answer_pattern: str | None = field(
        default=None, metadata={"help": "Of the verifier regex: a pattern whose one group is the answer."}
    )
    verifier_timeout: float | None = field(
        default=None, metadata={"help": "Seconds that math and code may take for one response. Default: 10."}
    )
    allow_code_execution: bool = field(
        default=False,
        metadata={
            "help": "Where bubblewrap does not work: run the model's programs all the same, under limits of time, "
            "memory and processes alone. They then run as a user of this machine: they can read and change what that "
            "user can, use the network, and end that user's processes."
        },
    )
    skip_invalid: bool = field(default=False, metadata={"help": "Count and skip records that do not parse."})

    def __post_init__(self) -> None:
        if self.prompt_template is not None and not Path(self.prompt_template).is_file():
            raise FileNotFoundError(f"prompt_template={self.prompt_template}: no such file")
        if self.verifier == "regex" and self.answer_pattern is None:
            raise ValueError("verifier='regex': give --answer_pattern, a pattern whose one group is the answer")
        if self.verifier_timeout is not None and not self.verifier_timeout > 0:
            raise ValueError(f"verifier_timeout={self.verifier_timeout}: expected above 0 seconds")


@dataclass
class PromptArguments(ReadingArguments):
    """Which prompts are answered: a task of the lab, or somebody's own."""

    task: str | None = field(default=None, metadata={"help": "addition, subtraction, sorting, reversing or sudoku."})
    givens: int = field(default=8, metadata={"help": "Cells of the sudoku that are given."})
    num_prompts: int = field(default=1000, metadata={"help": "Prompts drawn from the task."})
    prompt_seed: int = field(default=0, metadata={"help": "Draws the task's prompts."})
    prompts: str | None = field(
        default=None,
        metadata={
            "help": "JSONL, JSON, Parquet or CSV file, folder of `datasets`, or hub name: prompts, with answers."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_file("prompts", self.prompts)
        check_at_least("num_prompts", self.num_prompts, 1)
        if not 0 <= self.givens <= 16:
            raise ValueError(f"givens={self.givens}: expected 0 to 16 cells of a sudoku of 4x4")


@dataclass
class GenerateArguments:
    """What is answered and how it is shown."""

    prompt: list[str] = field(metadata={"help": "One or more prompts."})
    system_prompt: str | None = field(default=None, metadata={"help": "Opens every conversation."})
    animate: bool = field(default=False, metadata={"help": "Show the tokens appear, step by step."})
    color_by: Literal["step", "certainty"] = field(
        default="step", metadata={"help": "What the colours of the animation mean."}
    )


@dataclass
class EvaluateArguments(ReadingArguments):
    """What is evaluated on what."""

    prompts: list[str] | None = field(
        default=None, metadata={"help": "JSONL, JSON, Parquet or CSV files, folders of `datasets`, or hub names."}
    )
    task: list[str] | None = field(default=None, metadata={"help": "Tasks of the lab, on held-out prompts."})
    num_prompts: int | None = field(
        default=None, metadata={"help": "The first so many of each prompt set; of a task 500 by default."}
    )
    prompt_seed: int = field(default=0, metadata={"help": "Draws the tasks' prompts."})
    samplers: list[str] | None = field(
        default=None,
        metadata={"help": "Settings as field=value,field=value, each a column of its own, on top of the others given."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for source in self.prompts or []:
            check_file("prompts", source)
        check_at_least("num_prompts", self.num_prompts, 1)


@dataclass
class ExportArguments:
    """What is exported, and where to."""

    data: list[str] = field(metadata={"help": "Files, folders of `datasets` or hub names of trajectories."})
    output: str | None = field(
        default=None, metadata={"help": "File in .jsonl or .parquet, or a folder that `datasets` loads from disk."}
    )
    to: Literal["parquet", "jsonl", "datasets"] | None = field(
        default=None, metadata={"help": "Format. Default: by the name of the output."}
    )
    push_to: str | None = field(default=None, metadata={"help": "Hub name of a data set to push to."})


@dataclass
class RecipeArguments:
    """Which file."""

    name: str | None = field(
        default=None,
        metadata={
            "help": "Recipe for `tabom train`, or ddp, fsdp2 or deepspeed_zero3 for `accelerate launch`; --name may be "
            "left out. Default: all of them."
        },
    )


@dataclass
class MergeArguments:
    """What is merged, and where to."""

    adapter: str = field(metadata={"help": "Folder or hub name of an adapter, which names its base."})
    output_dir: str = field(metadata={"help": "New folder for the merged model and its tokenizer."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Of the merged weights, in memory and as they are saved."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the base."})


@dataclass
class ReportArguments:
    """What is reported."""

    inputs: list[str] | None = field(
        default=None,
        metadata={"help": "Files of trajectories, folders of training runs or evaluations; --inputs may be left out."},
    )
    output: str = field(default="report.html", metadata={"help": "HTML file."})
    title: str = field(default="TABOM report", metadata={"help": "Heading of the page."})
    limit: int = field(default=200, metadata={"help": "Responses of each file or cell."})
    replay: bool = field(
        default=False,
        metadata={"help": "Replay the responses with the model that made them, for probabilities and alternatives."},
    )

    def __post_init__(self) -> None:
        check_at_least("limit", self.limit, 1)
        check_output_file("output", self.output)
        if not self.inputs:
            raise ValueError("nothing to report: give trajectories, or a run's or evaluation's folder, before -o")


@dataclass
class DataArguments:
    """What is learnt from."""

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
    with_rejected: bool = field(
        default=False,
        metadata={"help": "Also read `<data>.rejected`, the wrong responses of collect; for --objective policy."},
    )
    skip_invalid: bool = field(default=False, metadata={"help": "Count and skip lines that do not parse."})
    dry_run: bool = field(
        default=False,
        metadata={"help": "Train the model's architecture with random weights, on made-up data, to see its cost."},
    )
    scale: Literal["full", "tiny"] = field(default="full", metadata={"help": "Size of the dry run's model."})

    def __post_init__(self) -> None:
        check_at_least("early_stopping_patience", self.early_stopping_patience, 1)
        for name in ("data", "eval_data"):
            check_file(name, getattr(self, name))


@dataclass
class AdapterArguments:
    """Whether an adapter is trained."""

    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the adapter."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the adapter."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"], metadata={"help": "Layers that get an adapter."}
    )

    def __post_init__(self) -> None:
        for name in ("lora_r", "lora_alpha"):
            check_at_least(name, getattr(self, name), 1)
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout}: expected a share in [0, 1)")


def name_inputs(argv: Sequence[str]) -> list[str]:
    """`RUN FILE -o PAGE` as `--inputs RUN FILE --output PAGE`; an option takes one value."""
    inputs: list[str] = []
    rest: list[str] = []
    for before, word in zip(["", *argv], argv, strict=False):
        is_value = before.startswith("-") or word.startswith("-")
        (rest if is_value else inputs).append("--output" if word == "-o" else word)
    return [*rest, "--inputs", *inputs] if inputs else rest


class Command(NamedTuple):
    """A command: a module of `tabom.cli`, whose `run` takes an instance of each of `types`."""

    module: str
    types: tuple[type, ...]
    description: str
    takes_recipe: bool = False
    hidden: tuple[type, ...] = ()  # fields that --help leaves out
    epilog: str | None = None  # what --help says of them


TRAINING_ARGUMENTS = """Every field of transformers' TrainingArguments is taken as well, such as --output_dir,
--num_train_epochs, --max_steps, --learning_rate, --per_device_train_batch_size, --gradient_accumulation_steps, --bf16,
--eval_strategy, --save_steps and --report_to; --help_all lists them all."""

PLAN_ARGUMENTS = """Every field of `tabom train` is taken as well, so that a recipe fits; --model, --use_peft,
--num_train_epochs and --supervised_window decide the cost. --help_all lists them all."""

COMMANDS = {
    "generate": Command(
        "generate", (GenerateArguments, ModelArguments, SamplerConfig, EngineConfig), "Answer prompts."
    ),
    "collect": Command(
        "collect",
        (PromptArguments, CollectConfig, ModelArguments, SamplerConfig, EngineConfig),
        "Answer a prompt set and keep the right answers with their decoding order.",
    ),
    "evaluate": Command(
        "evaluate",
        (EvaluateArguments, EvaluateConfig, ModelsArguments, SamplerConfig, EngineConfig),
        "Answer prompt sets with one or several models and measure the answers; every answer is kept.",
    ),
    "export": Command("export", (ExportArguments,), "Trajectories in other formats."),
    "report": Command(
        "report",
        (ReportArguments, ModelArguments),
        "One self-contained HTML file: tabom report RUN_OR_FILE... -o report.html",
    ),
    "train": Command(
        "train",
        (DataArguments, AdapterArguments, ModelArguments, TabomSettings),
        "Post-train on trajectories.",
        takes_recipe=True,
        epilog=TRAINING_ARGUMENTS,
    ),
    "improve": Command(
        "improve",
        (PromptArguments, ModelArguments, EngineConfig, ImproveConfig, AdapterArguments, TabomSettings),
        "Rounds: answer prompts with the current weights, judge the answers, and train on them.",
        epilog=TRAINING_ARGUMENTS,
    ),
    "merge": Command("merge", (MergeArguments,), "Merge an adapter into its base: a model that loads without either."),
    "plan": Command(
        "plan",
        (PlanConfig, DataArguments, AdapterArguments, ModelArguments, TabomSettings),
        "What a whole run computes, part by part.",
        takes_recipe=True,
        hidden=(DataArguments, AdapterArguments, ModelArguments, TabomSettings),
        epilog=PLAN_ARGUMENTS,
    ),
    "recipe": Command("recipe", (RecipeArguments,), "Where a YAML file of the package is: tabom recipe fsdp2"),
    "quickstart": Command("quickstart", (QuickstartConfig,), "The whole path, small."),
    "lab pretrain": Command("lab_pretrain", (PretrainConfig,), "Pre-train a model like those of the package."),
    "lab study": Command("lab_study", (StudyConfig,), "Compare the objectives on a grid."),
}
