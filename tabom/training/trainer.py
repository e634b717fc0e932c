"""`TabomTrainer`: transformers' Trainer with trajectories for data and the TABOM loss in the model's forward."""

import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from math import ceil, isfinite
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput, rotate_checkpoints

from tabom.data.prompts import PromptSet
from tabom.data.trajectories import Trajectory
from tabom.evaluation.answers import count_right
from tabom.evaluation.metrics import count_pairs_in_order
from tabom.models.diffusion_model import describe
from tabom.sampling.sampler import SamplerConfig
from tabom.training.card import model_card
from tabom.training.checkpoints import SAVING, check_same_run, newest_whole, publish
from tabom.training.collator import DENOMINATORS, FILLER, EpochSampler, TrajectoryCollator, TrajectoryDataset
from tabom.training.finite import check_step, check_weights
from tabom.training.forward import LossOutput, add_loss_to_forward
from tabom.training.objectives import Objective, ObjectiveSettings
from tabom.training.windows import WindowSize, WindowUnit

logger = logging.getLogger(__name__)


@dataclass
class TabomConfig(TrainingArguments):
    """Settings of the trainer, on top of transformers' `TrainingArguments`.

    Raises:
        ValueError: a window or length below one, a ratio outside (0, 1], or padding up to no length.
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
    loss_backend: Literal["triton", "torch", "reference"] | None = field(
        default=None, metadata={"help": "Backend of tabom_kernels. Default: the best for the device."}
    )
    fused_linear: bool = field(
        default=True,
        metadata={
            "help": "Compute the head together with the loss and never hold its logits. False for a model that does to "
            "its logits what its config does not say."
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
        for name in ("max_prompt_length", "max_response_length"):
            length = getattr(self, name)
            if length is not None and length < 1:
                raise ValueError(f"{name}={length}: expected at least 1 token")
        if self.pad_response and self.max_response_length is None:
            raise ValueError("pad_response=True with max_response_length=None: give the length to fill up to")
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, float) and not isfinite(value):
                raise ValueError(f"{each.name}={value}: expected a finite number")
        if not 0 < self.mask_ratio <= 1:
            raise ValueError(f"mask_ratio={self.mask_ratio}: expected a share in (0, 1]")

    @property
    def objective_settings(self) -> ObjectiveSettings:
        """The part that makes examples from trajectories."""
        return ObjectiveSettings(**{each.name: getattr(self, each.name) for each in fields(ObjectiveSettings)})

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
        settings = {name: getattr(self, name) for name in sorted(own - {"loss_backend", "fused_linear"})}
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


def window_size(name: str, value: int | str) -> WindowSize:
    """A window as the command line, a file or Python gives it."""
    if value == "all":
        return "all"
    if not str(value).isdecimal() or int(value) < 1:
        raise ValueError(f"{name}={value}: expected a number of at least 1, or all")
    return int(value)


class FollowEpoch(TrainerCallback):
    """Tells the sampler the epoch, also when a resumed run skips into the middle of one."""

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: TabomConfig, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int(state.epoch))


class TabomTrainer(Trainer):
    """Trains a diffusion language model on trajectories.

    Both denominators of the loss are counted over the global batch (all micro-batches of a step, all ranks), so
    gradient accumulation and data parallelism do not change it, unless `loss_average` says otherwise. Logs
    `cross_entropy` and `rank` (nats), and on the logging step itself `entropy` (mean over the rows of the loss, nats)
    and `order_accuracy` (share of the pairs in the rank window whose earlier position has the lower entropy).

    Args:
        model: with bidirectional attention; see `tabom.load`.
        args: a `TabomConfig`.
        train_dataset: trajectories.
        eval_dataset: trajectories.
        eval_prompts: answered and judged at every evaluation, for the figure `eval_accuracy`; every process answers its
            share.
        eval_sampler: how they are decoded; default: greedily, one token a step.
        processing_class: the tokenizer; saved beside the model.
        peft_config: trains an adapter of the model instead of its weights (needs peft). A model that was loaded with
            an adapter trains that one.
        kwargs: the other arguments of `transformers.Trainer`.

    Raises:
        ValueError: several GPUs in one process, no tokenizer, a second adapter, or a model that
            `describe` refuses.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TabomConfig,
        train_dataset: Sequence[Trajectory] | None = None,
        eval_dataset: Sequence[Trajectory] | None = None,
        eval_prompts: PromptSet | None = None,
        eval_sampler: SamplerConfig | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process: start with torchrun or accelerate launch, "
                "or set CUDA_VISIBLE_DEVICES"
            )
        if processing_class is None:
            raise ValueError("processing_class=None: pass the tokenizer; it says what masks, pads and ends a response")
        if peft_config is not None and model._hf_peft_config_loaded:
            raise ValueError(
                "peft_config: the model already carries an adapter, which is trained on without it; for a new adapter "
                "merge this one into its base and save that (peft's merge_and_unload)"
            )
        family = describe(model, processing_class)
        add_loss_to_forward(model, **args.loss_settings)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)

        def dataset(trajectories: Sequence[Trajectory] | None) -> TrajectoryDataset | None:
            if trajectories is None:
                return None
            return TrajectoryDataset(
                trajectories,
                processing_class,
                args.objective_settings,
                args.seed,
                args.max_prompt_length,
                args.max_response_length,
                family.pad_token_id if args.pad_response else None,
            )

        super().__init__(
            model=model,
            args=args,
            data_collator=TrajectoryCollator(family.mask_token_id, family.pad_token_id, family.logits_shift),
            train_dataset=dataset(train_dataset),
            eval_dataset=dataset([] if eval_dataset is None and eval_prompts is not None else eval_dataset),
            processing_class=processing_class,
            **kwargs,
        )
        self.eval_prompts = eval_prompts
        self.eval_sampler = eval_sampler or SamplerConfig()
        self._saving_in: Path | None = None
        self._losses: list[Tensor] = []  # of the step that is being made
        self.model_accepts_loss_kwargs = True  # the loss is already a mean over the global batch
        self._sums: dict[str, Tensor | float] = defaultdict(float)

    def create_accelerator_and_postprocess(self) -> None:
        """As transformers', but what FSDP2 casts in mixed precision are the weights, and nothing else.

        accelerate's policy also rounds the inputs (the weights of NELBO), the outputs (the loss) and the sums of
        gradients over the ranks.
        """
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = replace(
                plugin.mixed_precision_policy,
                reduce_dtype=torch.float32,
                output_dtype=None,
                cast_forward_inputs=False,
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """As transformers', from a checkpoint that is whole and of the same run, or none.

        Args:
            resume_from_checkpoint: a folder; True: the newest whole one of `output_dir`; "auto": the same, or a fresh
                start where there is none.

        Raises:
            ValueError: no data has anything to learn, the checkpoint is not whole, or it is of a run with other data,
                objective, seed or settings.
            FloatingPointError: a loss or gradient is not finite.
        """
        if not self.train_dataset.asks_anything():
            raise ValueError(
                f"none of the {len(self.train_dataset)} trajectories has anything to learn: every decoding_order is -1 "
                "throughout, or has too few steps for drop_short"
            )
        return super().train(resume_from_checkpoint=self._find_checkpoint(resume_from_checkpoint), **kwargs)

    def _find_checkpoint(self, resume: str | bool | None) -> str | None:
        """The checkpoint to go on with, the same on every rank."""
        if not resume:
            return None
        checkpoint = resume
        if resume is True or resume == "auto":
            checkpoint, broken = newest_whole(self.args.output_dir)
            for problem in broken if self.is_world_process_zero() else ():
                logger.warning("passed over: %s", problem)
            if checkpoint is None and resume is True:
                raise ValueError(
                    f"resume_from_checkpoint=True: no whole checkpoint in {self.args.output_dir}; 'auto' starts anew"
                )
        checkpoint = broadcast_object_list([checkpoint and str(checkpoint)])[0]
        if checkpoint is not None:
            check_same_run(Path(checkpoint), self._describe_run())
        return checkpoint

    def _describe_run(self) -> dict[str, Any]:
        """What decides the weights: JSON, the same on every rank and for any number of them."""
        adapters = getattr(self.model, "peft_config", {})
        return {
            "data": self.train_dataset.digest,
            **self.args.run_settings(self.accelerator.num_processes),
            "adapter": [describe_adapter(adapter) for adapter in adapters.values()],
        }

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._saving_in or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Whole or not at all, and never weights that are not finite."""
        folder = Path(self._get_output_dir(trial))
        written, final = (
            path / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}" for path in (folder / SAVING, folder)
        )
        check_weights(model, self.accelerator)
        if self.args.should_save:
            shutil.rmtree(folder / SAVING, ignore_errors=True)  # a killed run's
        self.accelerator.wait_for_everyone()
        self._saving_in = folder / SAVING
        super()._save_checkpoint(model, trial)
        self._saving_in = None
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(final)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
            publish(written, final, self._describe_run())
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(folder), self.args.save_total_limit, best_model_checkpoint=best)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model as it loads back, whole; a checkpoint of a sharded run may hold shards instead."""
        check_weights(self.model, self.accelerator)
        if self.is_fsdp_enabled and not _internal_call:
            self._save(output_dir or self.args.output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        else:
            super().save_model(output_dir, _internal_call)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> EpochSampler:
        shuffle = self.args.train_sampling_strategy != "sequential"
        together = self._together(self._train_batch_size)
        self._sampler = EpochSampler(len(self.train_dataset), self.args.seed, shuffle, together)
        self.add_callback(FollowEpoch(self._sampler))
        return self._sampler

    def _get_eval_sampler(self, eval_dataset: Dataset) -> EpochSampler:
        together = self._together(self.args.eval_batch_size)
        return EpochSampler(len(eval_dataset), self.args.seed, shuffle=False, multiple_of=together)

    def _together(self, batch_size: int) -> int:
        """Records that the processes take at once; 1 where a short last batch is no trouble, or dropped."""
        processes = self.accelerator.num_processes
        return 1 if processes == 1 or self.args.dataloader_drop_last else batch_size * processes

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Tensor]], device: torch.device
    ) -> dict[str, Tensor]:
        """The denominators of the loss over all micro-batches of a step and all ranks.

        `num_batches` are the micro-batches that ask anything.
        """
        counts = {name: sum(batch[name].to(device) for batch in batch_samples) for name in DENOMINATORS}
        counts["num_batches"] = torch.tensor(sum(len(batch["rows"]) > 0 for batch in batch_samples), device=device)
        return self.accelerator.reduce(counts, reduction="sum")

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Tensor | None = None) -> Tensor | float:
        """As transformers', and the last look before the optimizer's step."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        losses, self._losses = self._losses, []
        check_step(losses, grad_norm, self.state.global_step + 1, self._records_of, self.accelerator)
        return grad_norm

    def _records_of(self, rank: int) -> list[int]:
        """What a rank reads for the step that is being made."""
        keys, batch_size = list(self._sampler), self._train_batch_size
        processes, accumulation = self.accelerator.num_processes, self.args.gradient_accumulation_steps
        steps_an_epoch = ceil(len(keys) / (batch_size * processes * accumulation))
        first = self.state.global_step % steps_an_epoch * accumulation
        starts = [(micro * processes + rank) * batch_size for micro in range(first, first + accumulation)]
        return [index for start in starts for _, index in keys[start : start + batch_size] if index != FILLER]

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: dict[str, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, LossOutput]:
        """This micro-batch's share of the loss; `num_items_in_batch` are the global denominators."""
        processes = self.accelerator.num_processes
        if self.args.loss_average == "global_batch":
            inputs = {**inputs, **{name: num_items_in_batch[name] for name in DENOMINATORS}}
            share = 1.0
        else:  # the collator's denominators are those of the micro-batch
            share = 1 / num_items_in_batch["num_batches"].clamp(min=1)
        will_log = model.training and (self.state.global_step + 1) % self.state.logging_steps == 0
        output = model(**inputs, return_entropy=will_log)
        if model.training:
            self._losses.append(output.loss.detach())
            self._sums["steps"] += 1 / self.current_gradient_accumulation_steps
            self._sums["cross_entropy"] += output.cross_entropy * share
            self._sums["rank"] += output.rank * share
        if will_log:
            in_order, pairs = count_pairs_in_order(output.entropy, inputs["steps"], inputs["cu_seqlens"])
            self._sums["entropy"] += output.entropy.sum()
            self._sums["rows"] += len(output.entropy)
            self._sums["in_order"] += in_order
            self._sums["pairs"] += pairs
        loss = output.loss * share  # summed over the ranks it is the loss
        # Data parallelism averages gradients over the ranks.
        loss = loss * processes if model.training else self.accelerator.reduce(loss, reduction="sum")
        return (loss, output) if return_outputs else loss

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """The loss on trajectories, and the accuracy of the answers to `eval_prompts`."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.eval_prompts is not None:
            model = describe(self.accelerator.unwrap_model(self.model), self.processing_class)
            prompts = self.eval_prompts.share(self.args.process_index, self.args.world_size)
            counts = torch.tensor(count_right(model, prompts, self.eval_sampler), device=self.args.device)
            right, checked = self.accelerator.reduce(counts, reduction="sum").tolist()
            if checked:
                output.metrics[f"{metric_key_prefix}_accuracy"] = right / checked
            output.metrics[f"{metric_key_prefix}_checked_answers"] = checked
        return output

    def create_model_card(self, model_name: str | None = None, **kwargs: Any) -> None:
        """Writes README.md with method, data, settings and results; `push_to_hub` calls it too."""
        if not self.is_world_process_zero():
            return
        model = self.accelerator.unwrap_model(self.model)
        base = model.config.name_or_path or "random weights"
        name = model_name or Path(self.args.output_dir).name
        trajectories = self.train_dataset.trajectories if self.train_dataset is not None else []
        card = model_card(name, base, self.args, trajectories, self.state.log_history)
        card.save(Path(self.args.output_dir) / "README.md")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the loss terms since the last log, and the entropies of the logging step."""
        if "loss" in logs:
            logs |= self._take_sums()
        super().log(logs, start_time)

    def _take_sums(self) -> dict[str, float]:
        names = list(self._sums)
        sums = torch.stack([torch.as_tensor(self._sums[name], device=self.args.device).double() for name in names])
        total = dict(zip(names, self.accelerator.reduce(sums, reduction="sum").tolist(), strict=True))
        self._sums.clear()
        steps = total["steps"] / self.accelerator.num_processes
        terms = {"cross_entropy": total["cross_entropy"] / steps, "rank": total["rank"] / steps}
        if total.get("rows"):
            terms["entropy"] = total["entropy"] / total["rows"]
        if total.get("pairs"):
            terms["order_accuracy"] = total["in_order"] / total["pairs"]
        return terms


def describe_adapter(adapter: Any) -> dict[str, Any]:
    """JSON of a peft config, without the path of its base."""
    settings = json.loads(json.dumps(adapter.to_dict(), default=sorted))
    return {
        name: value for name, value in settings.items() if name not in ("base_model_name_or_path", "inference_mode")
    }
