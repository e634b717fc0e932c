"""Settings of the lab's commands. Imports no torch, so that the command line can check them quickly."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tabom.sampling.config import check_at_least

SHIPPED = "shipped"
"""The name of the model that comes with the package."""

PASS_SAMPLES = 16
"""How many samples of each problem pass@k is estimated from."""

WEAK_TASK_NAMES = ("subtraction", "sudoku")
"""Tasks on which the base has a low accuracy; `tabom.lab.experiment` defines them."""


def check_sizes(config: Any) -> None:
    """Raises a ValueError for a number of things that is below 1, or a list of none."""
    for name, value in vars(config).items():
        if name in ("processes", "batch_size", "attempts", "max_steps") or name.startswith("num_"):
            least = 0 if name == "num_adaptive_problems" else 1
            for each in value if isinstance(value, list) else [value]:
                check_at_least(name, each, least)
        if name != "path_steps" and value == []:
            raise ValueError(f"{name}: expected at least one value")


class Method(NamedTuple):
    """A training method of the study: settings of the trainer and the kind of data."""

    settings: dict[str, Any]  # fields of `TabomConfig`
    shuffles_pairs: bool = False
    on_truth: bool = False  # trains on the right answers to all prompts instead of the base's own responses
    paces: tuple[int, ...] = (1,)  # tokens a step; of the right responses to a prompt the slowest is trained on


def both_windows(size: int | str) -> dict[str, Any]:
    """The settings of supervised and rank window for M = W = `size`."""
    return {"supervised_window": size, "rank_window": size}


PAPER = {"objective": "tabom", "rank_loss": "hinge", "rank_margin": 0.1, "rank_weight": 1.0}
"""The ranking of the paper and its release."""

OBJECTIVES = {
    "NELBO, truth of all prompts": Method({"objective": "nelbo"}, on_truth=True),
    "NELBO": Method({"objective": "nelbo"}),
    "NELBO, exact weights": Method({"objective": "nelbo_exact"}),
    "NELBO with ranking": Method(PAPER | {"objective": "nelbo"}),
    "window": Method({"objective": "window", **both_windows(2)}),
    "TABOM as released": Method(PAPER | {"skip_last_step": True} | both_windows(2)),
    "TABOM": Method(PAPER | both_windows(2)),
    "whole path": Method({"objective": "window", **both_windows("all")}),
    "TABOM, whole path": Method(PAPER | both_windows("all")),
    "whole path, pairs shuffled": Method(PAPER | both_windows("all"), shuffles_pairs=True),
}


def rank_losses(
    form: str, scale: str, at_default: float, weights: Sequence[float], at_weight: float, scales: Sequence[float]
) -> dict[str, Method]:
    """Methods with one form of the rank loss over the whole path: at several weights, and at several scales.

    Args:
        form: of the rank loss.
        scale: "temperature" or "margin", which is `at_default` for all of `weights`.
        at_weight: the weight for all of `scales`.
    """
    points = [(weight, at_default) for weight in weights] + [(at_weight, value) for value in scales]
    return {
        f"{form}, weight {weight:g}, {scale} {value:g}": Method(
            {
                "objective": "tabom",
                **both_windows("all"),
                "rank_loss": form,
                "rank_weight": weight,
                "rank_margin": 0.0,
                f"rank_{scale}": value,
            }
        )
        for weight, value in points
    }


WEIGHTS = (0.03, 0.1, 0.3, 1.0, 3.0)
RANK_LOSSES = {
    **rank_losses("logistic", "temperature", 1.0, WEIGHTS, 0.3, (0.05, 0.2, 0.5)),
    **rank_losses("hinge", "margin", 0.1, WEIGHTS, 0.3, (0.0, 0.3, 1.0)),
    **rank_losses("plackett_luce", "temperature", 1.0, WEIGHTS, 0.3, (0.2, 0.5)),
}
"""The forms of the rank loss, each over weights and over temperatures or margins."""

DEFAULT = "TABOM, defaults"
DEFAULT_SETTINGS = {
    "objective": "tabom",
    **both_windows("all"),
    "rank_loss": "logistic",
    "rank_weight": 0.3,
    "rank_margin": 0.0,
}
"""The defaults of `TabomConfig`."""

PACES = (1, 2, 4)
PARALLEL = {
    "NELBO, exact weights, several paces": Method({"objective": "nelbo_exact"}, paces=PACES),
    "whole path, several paces": Method({"objective": "window", **both_windows("all")}, paces=PACES),
    "TABOM, parallel": Method(DEFAULT_SETTINGS | {"rank_weight": 0.1, "tokens_per_step": 4}, paces=PACES),
}
"""For parallel decoding, and the controls: learnt from responses that were decoded at 1, 2 or 4 tokens a step."""

METHODS = {**OBJECTIVES, **RANK_LOSSES, DEFAULT: Method(DEFAULT_SETTINGS), **PARALLEL}
METHOD_SETS = {"objectives": OBJECTIVES, "rank_losses": RANK_LOSSES, "parallel": PARALLEL}
"""What `--methods` can be given instead of the names of all methods of a set."""


@dataclass
class QuickstartConfig:
    """Sizes of the quickstart."""

    output_dir: str = field(default="runs/quickstart", metadata={"help": "Where everything is written."})
    model: str = field(default=SHIPPED, metadata={"help": "The base: a folder, or the model of the package."})
    num_prompts: int = field(default=2000, metadata={"help": "Prompts answered to collect trajectories."})
    attempts: int = field(default=8, metadata={"help": "Attempts a prompt; the first right one is kept."})
    num_problems: int = field(default=400, metadata={"help": "Held-out problems of the weak task."})
    num_other_problems: int = field(default=60, metadata={"help": "Held-out problems of each other task."})
    num_pass_problems: int = field(default=80, metadata={"help": "Held-out problems sampled 16 times for pass@k."})
    max_steps: int = field(default=300, metadata={"help": "Training steps of each method."})
    batch_size: int = field(default=32, metadata={"help": "Trajectories a training step."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate of each method."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of prompts, cuts and batches."})
    processes: int = field(default=2, metadata={"help": "Training runs at a time, one thread each."})

    def __post_init__(self) -> None:
        check_sizes(self)


@dataclass
class PretrainConfig:
    """Settings of `tabom lab pretrain`."""

    output_dir: str = "runs/lab-base"
    max_steps: int = 2000
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    seed: int = 0
    block_size: int | None = field(
        default=None, metadata={"help": "Tokens of a block of block-causal attention. Default: full attention."}
    )

    def __post_init__(self) -> None:
        check_at_least("block_size", self.block_size, 1)


@dataclass
class StudyConfig:
    """The grid, and the sizes of a run."""

    output_dir: str = field(default="runs/study", metadata={"help": "Where results.jsonl grows."})
    model: list[str] = field(default_factory=lambda: [SHIPPED], metadata={"help": "The bases: shipped, or folders."})
    task: list[str] = field(default_factory=lambda: ["subtraction"], metadata={"help": "subtraction, sudoku."})
    methods: list[str] = field(
        default_factory=lambda: ["objectives"],
        metadata={"help": f"Names of methods, or {', '.join(METHOD_SETS)}; the base is measured in any case."},
    )
    learning_rates: list[float] = field(default_factory=lambda: [2e-4, 3e-4], metadata={"help": "Peaks."})
    attempts: list[int] = field(
        default_factory=lambda: [1],
        metadata={"help": "Attempts a prompt. 1: greedy; more: samples, the first right one is kept."},
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of prompts, cuts and batches."})
    processes: int = field(default=1, metadata={"help": "Runs at a time."})
    save_models: bool = field(default=False, metadata={"help": "Keep the trained models, under models."})
    max_steps: int = field(default=300, metadata={"help": "Training steps."})
    path_steps: list[int] = field(default_factory=lambda: [75, 150], metadata={"help": "Steps also measured on."})
    batch_size: int = field(default=64, metadata={"help": "Trajectories a training step."})
    num_prompts: int = field(default=2000, metadata={"help": "Prompts answered to collect trajectories."})
    num_problems: int = field(default=400, metadata={"help": "Held-out problems of the weak task."})
    num_path_problems: int = field(default=40, metadata={"help": "Of each other task, at path_steps."})
    num_other_problems: int = field(default=100, metadata={"help": "Of each other task, at the end."})
    num_pass_problems: int = field(default=100, metadata={"help": f"Problems sampled {PASS_SAMPLES} times."})
    num_adaptive_problems: int = field(
        default=200, metadata={"help": "Problems of the weak task for each adaptive policy; 0: none is tried."}
    )
    num_replayed: int = field(default=100, metadata={"help": "Trajectories replayed for pair order and TDS."})

    def __post_init__(self) -> None:
        check_sizes(self)
        self.methods = [name for each in self.methods for name in METHOD_SETS.get(each, [each])]
        for name, known in (("task", WEAK_TASK_NAMES), ("methods", METHODS)):
            for value in getattr(self, name):
                if value not in known:
                    raise ValueError(f"{name}={value!r}: expected some of {', '.join(known)}")


@dataclass
class PlanConfig:
    """The size of a run; lengths are means over prompts, in tokens."""

    num_prompts: int = field(default=12000, metadata={"help": "Prompts answered once each to collect trajectories."})
    gpus: int = field(default=8, metadata={"help": "GPUs that share the work."})
    longest_prompt: int = field(default=256, metadata={"help": "What a fixed batch is padded to."})
    mean_prompt: int = field(default=120, metadata={"help": "Mean length of a prompt."})
    response: int = field(default=256, metadata={"help": "Length of a response; one token is decided a step."})
    mean_answer: int = field(default=150, metadata={"help": "Mean steps until all before the end is decided."})
    block_length: int = field(default=32, metadata={"help": "Of the block cache, tokens."})
    right: float = field(default=0.425, metadata={"help": "Share of the answers that verification keeps."})
    evaluated: int = field(default=2000, metadata={"help": "Answers made for evaluation, base and tuned together."})
    efficiency: float = field(default=0.4, metadata={"help": "Share of the H100's bf16 rate that is reached; a guess."})

    def __post_init__(self) -> None:
        for name in ("right", "efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a share in (0, 1]")
        for name in ("num_prompts", "gpus", "mean_prompt", "response", "block_length", "evaluated"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        if not self.block_length <= self.response or not 1 <= self.mean_answer <= self.response:
            raise ValueError(
                f"block_length={self.block_length}, mean_answer={self.mean_answer}: expected at most "
                f"response={self.response}"
            )
