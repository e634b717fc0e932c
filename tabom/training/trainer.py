"""`TabomTrainer`: transformers' Trainer with trajectories for data and the TABOM loss in the model's forward."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from tabom.data.trajectories import Trajectory
from tabom.evaluation.metrics import count_pairs_in_order
from tabom.models.diffusion_model import describe
from tabom.training.collator import DENOMINATORS, EpochSampler, TrajectoryCollator, TrajectoryDataset
from tabom.training.forward import LossOutput, add_loss_to_forward
from tabom.training.objectives import Objective, ObjectiveSettings
from tabom.training.windows import WindowSize, WindowUnit


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
            "help": "Compute the head together with the loss and never hold its logits. False for a model that scales "
            "or soft-caps its logits."
        },
    )
    # Only the loss is evaluated, never (B, L, V) logits; and the collator reads whole trajectories.
    prediction_loss_only: bool = True
    remove_unused_columns: bool = False

    def __post_init__(self) -> None:
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
            eval_dataset=dataset(eval_dataset),
            processing_class=processing_class,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = True  # the loss is already a mean over the global batch
        self._sums: dict[str, Tensor | float] = defaultdict(float)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> EpochSampler:
        shuffle = self.args.train_sampling_strategy != "sequential"
        sampler = EpochSampler(len(self.train_dataset), self.args.seed, shuffle)
        self.add_callback(FollowEpoch(sampler))
        return sampler

    def _get_eval_sampler(self, eval_dataset: Dataset) -> EpochSampler:
        return EpochSampler(len(eval_dataset), self.args.seed, shuffle=False)

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Tensor]], device: torch.device
    ) -> dict[str, Tensor]:
        """The denominators of the loss over all micro-batches of a step and all ranks."""
        counts = {name: sum(batch[name].to(device) for batch in batch_samples) for name in DENOMINATORS}
        return self.accelerator.reduce(counts, reduction="sum")

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
            inputs = {**inputs, **num_items_in_batch}
            share = 1.0
        else:  # the collator's denominators are those of the micro-batch
            share = 1 / processes / (self.current_gradient_accumulation_steps if model.training else 1)
        will_log = model.training and (self.state.global_step + 1) % self.state.logging_steps == 0
        output = model(**inputs, return_entropy=will_log)
        if model.training:
            self._sums["steps"] += 1 / self.current_gradient_accumulation_steps
            self._sums["cross_entropy"] += output.cross_entropy * share
            self._sums["rank"] += output.rank * share
        if will_log:
            in_order, pairs = count_pairs_in_order(output.entropy, inputs["steps"], inputs["cu_seqlens"])
            self._sums["entropy"] += output.entropy.sum()
            self._sums["rows"] += len(output.entropy)
            self._sums["in_order"] += in_order
            self._sums["pairs"] += pairs
        # Data parallelism averages over the ranks, while this loss is a sum over them.
        loss = output.loss * share * processes
        return (loss, output) if return_outputs else loss

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
