"""`TabomConfig`: every setting of `TabomTrainer`."""

import json
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from math import isfinite
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from tabom.models.diffusion_model import DiffusionModel
from tabom.sampling.config import check_at_least
from tabom.training.objectives import ObjectiveSettings
from tabom.training.renamed import accept_old_names
from tabom.training.settings import TabomSettings


@accept_old_names
@dataclass
class TabomConfig(TabomSettings, TrainingArguments):
    """Settings of the trainer, on top of transformers' `TrainingArguments`.

    Raises:
        ValueError: a number is out of its range, `pad_response` is set without `max_response_length`, the tracker of
            `report_to` is not installed, or a setting of transformers would have no effect.
    """

    # Evaluation needs the loss and no (B, L, V) logits, and the collator needs all columns.
    prediction_loss_only: bool = True
    remove_unused_columns: bool = False
    logging_nan_inf_filter: bool = False  # a loss that is not finite ends the training

    def __post_init__(self) -> None:
        if self.eval_prompts is not None and self.metric_for_best_model is None:
            self.metric_for_best_model = "accuracy"
        self.check_numbers()
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()  # else bf16 is refused on a CPU
        TrainingArguments.__post_init__(self)
        TabomSettings.__post_init__(self)
        check_reporting(self.report_to)
        self.check_effects()

    def check_numbers(self) -> None:
        """Raises a ValueError for a number of transformers that is out of its range, before any work is done."""
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, float) and not isfinite(value):
                raise ValueError(f"{each.name}={value}: expected a finite number")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            check_at_least(name, getattr(self, name), 1)
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps"):
            check_at_least(name, getattr(self, name), 0)
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise ValueError(f"num_train_epochs={self.num_train_epochs}: expected above 0, or --max_steps")

    def check_effects(self) -> None:
        """Raises a ValueError for a setting of transformers that has no effect here, or the wrong one."""
        for each in fields(self):
            if each.name in FIXED:
                default = each.default if each.default is not MISSING else each.default_factory()
                if (value := getattr(self, each.name)) != default:
                    raise ValueError(f"{each.name}={value!r}: expected {default!r}, because {FIXED[each.name]}")
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"train_sampling_strategy={self.train_sampling_strategy!r}: expected random or sequential, because the "
                "order of the records must depend on the seed and the epoch alone"
            )
        for name in ("split_batches", "dispatch_batches"):
            if getattr(self.accelerator_config, name):
                raise ValueError(
                    f"accelerator_config {name}=True: expected False, because a batch is packed and cannot be split"
                )
        if self.use_liger_kernel and (self.liger_kernel_config or {}).get("fused_linear_cross_entropy", True):
            raise ValueError(
                "use_liger_kernel=True would replace the loss; add liger_kernel_config="
                "'{\"fused_linear_cross_entropy\": false}' for its other kernels"
            )
        for name in ("cp_size", "sp_size"):
            if getattr(self.parallelism_config, name, 1) > 1:
                raise ValueError(f"parallelism_config {name}: expected 1, because the rows of a sequence stay together")

    @property
    def objective_settings(self) -> ObjectiveSettings:
        """The settings that make examples of trajectories, for a model with full attention."""
        own = {each.name for each in fields(ObjectiveSettings)} - {"block_size"}
        return ObjectiveSettings(**{name: getattr(self, name) for name in own})

    def tokenizing_settings(self, diffusion_model: DiffusionModel) -> dict[str, Any]:
        """The settings that `tabom.data.tokenized.tokenize` takes, with the conventions of the model's family."""
        return {
            "max_prompt_length": self.max_prompt_length,
            "max_response_length": self.max_response_length,
            "pad_token_id": diffusion_model.pad_token_id if self.pad_response else None,
            "block_padding": (diffusion_model.block_size, diffusion_model.pad_token_id)
            if self.pad_last_block
            else None,
            "logits_shift": diffusion_model.logits_shift,
            "num_proc": self.dataset_num_proc,
        }

    def run_settings(self, processes: int) -> dict[str, Any]:
        """The settings that a resumed run must not change: all that decide the weights, except the run's length."""
        own = {each.name for each in fields(TabomSettings)}
        own -= {"loss_backend", "fused_linear", "dataset_num_proc", "peer_timeout"}
        settings = {name: getattr(self, name) for name in sorted(own)}
        for name in SAME_IN_A_RUN:
            settings[name] = getattr(self, name)
        together = self.per_device_train_batch_size * self.gradient_accumulation_steps * processes
        return json.loads(json.dumps({**settings, "records_a_step": together}, default=str))


NO_LOGITS = "the head computes the loss without the logits, so there are none to predict with; give eval_prompts"

FIXED = {
    "label_smoothing_factor": "the cross-entropy of tabom_kernels has no smoothed labels",
    "average_tokens_across_devices": "loss_average decides this",
    "logging_nan_inf_filter": "a loss that is not finite ends the training",
    "remove_unused_columns": "the collator needs all that it is given",
    "label_names": "the collator names its tensors itself",
    "length_column_name": "records are not sampled by their length",
    "enable_jit_checkpoint": "training saves a checkpoint at SIGTERM in any case",
    "data_seed": "seed draws the order of the records as well as their cuts",
    "prediction_loss_only": NO_LOGITS,
    "include_for_metrics": NO_LOGITS,
    "batch_eval_metrics": NO_LOGITS,
    "eval_do_concat_batches": NO_LOGITS,
    "eval_use_gather_object": NO_LOGITS,
}
"""Fields of `TrainingArguments` that must keep their default, and why."""

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
