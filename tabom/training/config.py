"""`TabomConfig`: every setting of `TabomTrainer`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from math import isfinite
from typing import Any, Literal

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from tabom.sampling.policies import check_at_least
from tabom.training.objectives import Objective, ObjectiveSettings
from tabom.training.windows import WindowSize, WindowUnit


@dataclass
class TabomConfig(TrainingArguments):
    """Settings of the trainer, on top of transformers' `TrainingArguments`.

    Raises:
        ValueError: a number out of its range, padding up to no length, or a report to what is not installed.
    """

    objective: Objective = field(
        default="tabom",
        metadata={
            "help": "tabom: window cross-entropy and ranking. window: without the ranking. nelbo: each token masked "
            "with probability t, weight 1/t. nelbo_exact: k of T tokens masked, weight T/k. fixed_ratio: a fixed share "
            "masked."
        },
    )
    supervised_window: int | str = field(
        default="all", metadata={"help": "M: what follows the cut with cross-entropy, or `all`: every later token."}
    )
    rank_window: int | str = field(
        default="all", metadata={"help": "W: what follows the cut whose pairs are ranked, or `all`. NELBO ranks all."}
    )
    window_unit: WindowUnit = field(default="steps", metadata={"help": "What supervised_window and rank_window count."})
    rank_weight: float | None = field(
        default=None, metadata={"help": "Weight of the rank loss. Default: 1 for tabom, 0 for the other objectives."}
    )
    form: Literal["logistic", "hinge", "plackett_luce"] = field(
        default="logistic", metadata={"help": "Form of the rank loss."}
    )
    margin: float = field(default=0.0, metadata={"help": "Of logistic and hinge, nats."})
    temperature: float = field(default=1.0, metadata={"help": "tau of logistic and plackett_luce, nats."})
    mask_ratio: float = field(default=0.5, metadata={"help": "Share of tokens that fixed_ratio masks."})
    cut_among_non_ltr: bool = field(
        default=False, metadata={"help": "Draw the cut among the steps of the record's non_ltr_positions."}
    )
    skip_last_step: bool = field(
        default=False, metadata={"help": "Draw the cut up to s_max - M, as released: the last step is never learnt."}
    )
    rank_ties: bool = field(
        default=False,
        metadata={"help": "Rank tokens of one step as if unmasked one by one: by entropy, else left to right."},
    )
    drop_short: bool = field(
        default=False, metadata={"help": "Learn nothing from trajectories of no more than supervised_window steps."}
    )
    loss_average: Literal["global_batch", "micro_batch"] = field(
        default="global_batch",
        metadata={
            "help": "Of tokens and of sequences: over all micro-batches and ranks of a step, or over each micro-batch "
            "and then over micro-batches and ranks."
        },
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Tokens; longer prompts lose the end of their last message. Default: no limit."}
    )
    max_response_length: int | None = field(
        default=None, metadata={"help": "Tokens; longer responses lose their end. Default: no limit."}
    )
    pad_response: bool = field(
        default=False,
        metadata={"help": "Fill responses up to max_response_length with padding to be learnt, decoded last."},
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenize the data. Default: one."}
    )
    loss_backend: Literal["triton", "torch", "reference"] | None = field(
        default=None, metadata={"help": "Backend of tabom_kernels. Default: the best for the device."}
    )
    fused_linear: bool = field(
        default=True,
        metadata={
            "help": "Compute the head together with the loss and never hold its logits, where the head allows it. "
            "False: the logits of the selected rows."
        },
    )
    eval_prompts: str | None = field(
        default=None,
        metadata={
            "help": "Prompts that are answered at every evaluation: the figure eval_accuracy, by which the best "
            "checkpoint is then chosen."
        },
    )
    eval_verifier: str | None = field(
        default=None, metadata={"help": "Judges these answers. Default: by the shape of the data."}
    )
    eval_num_prompts: int | None = field(default=None, metadata={"help": "Only the first so many of eval_prompts."})
    eval_sampler: str | None = field(
        default=None, metadata={"help": "How they are decoded, as field=value,field=value of the sampler."}
    )
    # Only the loss is evaluated, never (B, L, V) logits; and the collator reads whole trajectories.
    prediction_loss_only: bool = True
    remove_unused_columns: bool = False
    logging_nan_inf_filter: bool = False  # what is not finite ends the training

    def __post_init__(self) -> None:
        if self.eval_prompts is not None and self.metric_for_best_model is None:
            self.metric_for_best_model = "accuracy"
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()  # else bf16 is refused on a CPU
        super().__post_init__()
        self.supervised_window = window_size("supervised_window", self.supervised_window)
        self.rank_window = window_size("rank_window", self.rank_window)
        if self.rank_weight is None:
            self.rank_weight = 1.0 if self.objective == "tabom" else 0.0
        for name in ("max_prompt_length", "max_response_length", "eval_num_prompts"):
            check_at_least(name, getattr(self, name), 1)
        if self.pad_response and self.max_response_length is None:
            raise ValueError("pad_response=True with max_response_length=None: give the length to fill up to")
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, float) and not isfinite(value):
                raise ValueError(f"{each.name}={value}: expected a finite number")
        check_at_least("rank_weight", self.rank_weight, 0)
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: expected above 0 nats")
        check_reporting(self.report_to)
        if not 0 < self.mask_ratio <= 1:
            raise ValueError(f"mask_ratio={self.mask_ratio}: expected a share in (0, 1]")

    @property
    def objective_settings(self) -> ObjectiveSettings:
        """The part that makes examples from trajectories."""
        return ObjectiveSettings(**{each.name: getattr(self, each.name) for each in fields(ObjectiveSettings)})

    def tokenizing_settings(self, pad_token_id: int) -> dict[str, Any]:
        """The part that `tabom.data.tokenized.tokenize` takes, with what the model's family pads with."""
        return {
            "max_prompt_length": self.max_prompt_length,
            "max_response_length": self.max_response_length,
            "pad_token_id": pad_token_id if self.pad_response else None,
            "num_proc": self.dataset_num_proc,
        }

    @property
    def loss_settings(self) -> dict[str, Any]:
        """The part that `tabom.training.forward.add_loss_to_forward` takes."""
        return {
            "rank_weight": self.rank_weight,
            "form": self.form,
            "margin": self.margin,
            "temperature": self.temperature,
            "backend": self.loss_backend,
            "fused_linear": self.fused_linear,
        }

    def run_settings(self, processes: int) -> dict[str, Any]:
        """What an interrupted run must not change: all that decides the weights, but its length."""
        own = {each.name for each in fields(TabomConfig)} - {each.name for each in fields(TrainingArguments)}
        own -= {"loss_backend", "fused_linear", "dataset_num_proc"}
        settings = {name: getattr(self, name) for name in sorted(own)}
        for name in SAME_IN_A_RUN:
            settings[name] = getattr(self, name)
        together = self.per_device_train_batch_size * self.gradient_accumulation_steps * processes
        return json.loads(json.dumps({**settings, "records_a_step": together}, default=str))


SAME_IN_A_RUN = (
    "seed",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "bf16",
    "fp16",
    "train_sampling_strategy",
)
"""Fields of `TrainingArguments` that decide the weights."""


def check_reporting(report_to: Sequence[str]) -> None:
    """Raises a ValueError for a tracker that is not installed, before a model is loaded for it."""
    for name in report_to:
        if name in INTEGRATION_TO_CALLBACK and name not in get_available_reporting_integrations():
            raise ValueError(f"report_to={name}: not installed; pip install {name.replace('_', '-')}, or none")


def window_size(name: str, value: int | str) -> WindowSize:
    """A window as the command line, a file or Python gives it."""
    if value == "all":
        return "all"
    if not str(value).isdecimal() or int(value) < 1:
        raise ValueError(f"{name}={value}: expected a number of at least 1, or all")
    return int(value)
