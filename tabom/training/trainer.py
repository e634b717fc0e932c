"""`TabomTrainer`: transformers' Trainer with trajectories for data and the TABOM loss in the model's forward."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import ceil, isfinite
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from transformers.utils import check_peft_version

from tabom.data.job_lock import locked
from tabom.data.prompts import PromptSet
from tabom.data.trajectories import Trajectory
from tabom.evaluation.responses import count_right
from tabom.models.attention import check_attention
from tabom.models.diffusion_model import DiffusionModel, describe
from tabom.models.loading import as_diffusion_model
from tabom.models.nan_checks import logits_not_finite
from tabom.sampling.answerable import check_prompts
from tabom.sampling.config import SamplerConfig
from tabom.sampling.ranks import joined
from tabom.sampling.termination import termination
from tabom.training.card import model_card
from tabom.training.collator import DENOMINATORS, TrajectoryCollator
from tabom.training.config import NO_LOGITS, TabomConfig
from tabom.training.examples import FILLER, EpochSampler, ExampleReader
from tabom.training.forward import LossOutput, add_loss_to_forward
from tabom.training.loss_terms import LossTerms
from tabom.training.nan_checks import check_step
from tabom.training.saving import CheckpointingTrainer
from tabom.training.settings import has_ratios
from tabom.training.stream import TrajectoryStream

Records = datasets.Dataset | datasets.IterableDataset | IterableDataset | Sequence[dict[str, Any] | Trajectory]
"""What examples are made of."""

REFUSED = {
    "data_collator": "the loss needs the batches of TrajectoryCollator",
    "model_init": "the loss is put into the model that is given",
    "compute_loss_func": "the head computes the loss; for another one use add_loss_to_forward in a loop of your own",
    "compute_metrics": NO_LOGITS,
    "preprocess_logits_for_metrics": NO_LOGITS,
}
"""Arguments of `transformers.Trainer` that would have no effect, and why."""


LOCK = "_lock"
"""File in the output folder that a job locks while it trains; transformers pushes no file that begins so."""


class FollowEpoch(TrainerCallback):
    """Sets the epoch of the sampler, also if a resumed run starts in the middle of one."""

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: TabomConfig, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int(state.epoch))


class TabomTrainer(CheckpointingTrainer):
    """Trains a diffusion language model on trajectories.

    Both denominators of the loss are counted over the global batch (all micro-batches of a step, all ranks), so
    gradient accumulation and data parallelism do not change it, unless `loss_average` says otherwise. Logs
    `cross_entropy` and `rank` (nats), and on the logging step itself `entropy` (mean over the rows of the loss, nats)
    and `order_accuracy` (share of the pairs in the rank window whose earlier position has the lower entropy). With the
    objective `policy` it logs `policy` in place of the cross-entropy, and `ratio`, `clip_share` and `kl` (see
    `LossTerms.add_ratios`).

    Args:
        model: a name or folder, a `DiffusionModel` from `tabom.load` (for another dtype or attention), or a model of
            transformers with bidirectional attention.
        args: a `TabomConfig`; default: default settings, with the output folder `<model>-TABOM`.
        train_dataset: trajectories: a `datasets.Dataset` or a list of records in any spelling that `parse_trajectory`
            reads, or of `Trajectory`. A data set is tokenized once; other ranks and later runs read it from the cache.
            A table from `tabom.data.tokenized.tokenize` is used directly. A stream (`IterableDataset`) is tokenized
            while it is read; it needs `max_steps`, and its order is that of the stream.
        eval_dataset: the same, or several by name, whose figures are then called `eval_<name>_loss`.
        eval_prompts: prompts that are decoded and judged at every evaluation of `eval_dataset`, for the figure
            `eval_accuracy`; the processes share them.
        eval_sampler: how they are decoded; default: greedily, one token a step.
        processing_class: the tokenizer, which is saved with the model; default: that of the model's name or folder.
        peft_config: trains an adapter of the model instead of its weights (needs peft). If the model was loaded with
            an adapter, that adapter is trained.
        kwargs: the other arguments of `transformers.Trainer`, except those in `REFUSED`.

    Raises:
        TypeError: args are no `TabomConfig`.
        ValueError: an argument in `REFUSED`, several GPUs in one process, a tokenizer that is neither given nor to be
            found, a second adapter, several evaluation sets of which `metric_for_best_model` names none, records longer
            than the model's table of positions, an empty prompt that the model cannot answer, an adapter to train on
            and a peft that is too old for transformers, or a model that `load` or `describe` refuses.
    """

    def __init__(
        self,
        model: str | Path | DiffusionModel | PreTrainedModel,
        args: TabomConfig | None = None,
        train_dataset: Records | None = None,
        eval_dataset: Records | dict[str, Records] | None = None,
        eval_prompts: PromptSet | None = None,
        eval_sampler: SamplerConfig | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        for name in REFUSED.keys() & kwargs.keys():
            if kwargs.pop(name) is not None:
                raise ValueError(f"{name}: not used by TabomTrainer, because {REFUSED[name]}")
        diffusion_model = as_diffusion_model(model, processing_class)
        model, processing_class = diffusion_model.model, diffusion_model.tokenizer
        if not isinstance(args, TabomConfig | None):
            raise TypeError(f"args: expected a TabomConfig, got {type(args).__name__}")
        args = args or TabomConfig(f"{Path(model.name_or_path).name or model.config.model_type}-TABOM")
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process: start with torchrun or accelerate launch, "
                "or set CUDA_VISIBLE_DEVICES"
            )
        if model.tp_size is not None and model.tp_size > 1:
            raise ValueError(
                f"model: sharded over {model.tp_size} processes by its tp_plan, and the trainer gives each process "
                "records of its own; shard it by FSDP, or train it in a loop of your own with `add_loss_to_forward`"
            )
        if peft_config is not None and model._hf_peft_config_loaded:
            raise ValueError(
                "peft_config: the model already carries an adapter, which is trained on without it; for a new adapter "
                "merge this one into its base (tabom merge, tabom.merge_adapter) and load the merged folder"
            )
        if model._hf_peft_config_loaded:
            check_peft_version(MIN_PEFT_VERSION)  # saving the adapter would do so, after the training
        args.check_attention(diffusion_model.block_size, diffusion_model.logits_shift)
        if diffusion_model.block_size is not None:
            check_attention(model.config, args.device)
        add_loss_to_forward(model, **args.loss_settings)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)

        self._reader = ExampleReader(args, diffusion_model, processing_class)
        if isinstance(eval_dataset, dict) and args.metric_for_best_model in ("loss", "eval_loss"):
            raise ValueError(
                f"metric_for_best_model={args.metric_for_best_model!r} with several evaluation sets: expected "
                f"{' or '.join(f'eval_{name}_loss' for name in eval_dataset)}"
            )
        if eval_prompts is not None:
            check_prompts(diffusion_model, eval_prompts)
        train_dataset = self._reader.train(train_dataset)
        eval_dataset = self._reader.evaluate([] if eval_dataset is None and eval_prompts is not None else eval_dataset)

        super().__init__(
            model=model,
            args=args,
            data_collator=TrajectoryCollator(
                diffusion_model.mask_token_id,
                diffusion_model.pad_token_id,
                diffusion_model.logit_rows,
                diffusion_model.block_size,
                args.first_token_logits,
                self._reader.sampling_temperature(train_dataset, eval_dataset),
                has_ratios(args.supervised_window, args.window_unit),
            ),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.eval_prompts = eval_prompts
        self.eval_sampler = eval_sampler or SamplerConfig()
        self._decodes_prompts = False
        self._ranks_terminated = torch.tensor(0)
        self._losses: list[Tensor] = []  # of the micro-batches of the current step
        self.model_accepts_loss_kwargs = True  # the loss is already a mean over the global batch
        self._loss_terms = LossTerms()

    def create_accelerator_and_postprocess(self) -> None:
        """Creates the accelerator as transformers does, with mixed precision of FSDP2 for the weights only.

        accelerate's default policy would also round the inputs (NELBO's weights), the outputs (the loss) and the sums
        of gradients over the ranks.

        Raises:
            ValueError: ZeRO-3 is set up in such a way that no loadable model would be saved.
        """
        super().create_accelerator_and_postprocess()
        # Each process reads a stream itself: batches are packed, so one process could not share them out.
        self.accelerator.dataloader_config.dispatch_batches = False
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = replace(
                plugin.mixed_precision_policy,
                reduce_dtype=torch.float32,
                output_dtype=None,
                cast_forward_inputs=False,
            )
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is not None and plugin.zero_stage == 3 and not plugin.zero3_save_16bit_model:
            raise ValueError(
                "deepspeed: ZeRO-3 without stage3_gather_16bit_weights_on_model_save (zero3_save_16bit_model in a "
                "config of accelerate) saves no model that loads; set it to true"
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Trains as transformers' Trainer does, from a checkpoint that is complete and of the same run, or from none.

        Args:
            resume_from_checkpoint: a folder; True: the newest complete one of `output_dir`; "auto": the same, or a
                fresh start where there is none.

        Raises:
            ValueError: the data has no token to learn from, the checkpoint is not complete, it belongs to a run with
                other data, another objective, seed or setting, or another job trains into `output_dir`.
            FloatingPointError: a loss or gradient is not finite.
            Terminated: SIGTERM came; a checkpoint of the last step is saved.
        """
        if self.train_dataset is not None and not self.train_dataset.has_targets():
            raise ValueError(
                f"none of the {len(self.train_dataset)} trajectories has anything to learn: every decoding_order is -1 "
                "throughout, or has too few steps for drop_short"
            )
        lock = Path(self.args.output_dir) / LOCK
        with (
            joined(self.args.peer_timeout) as ranks,
            locked(lock, ranks, f"output_dir={self.args.output_dir}", "choose another one"),
        ):
            return super().train(resume_from_checkpoint, **kwargs)

    def train_on(self, train_dataset: Records, output_dir: str, seed: int) -> list[dict[str, float]]:
        """Trains the weights as they are on other data, with a new optimizer and schedule; returns the log.

        A training of the same data in `output_dir` that was interrupted goes on from its newest checkpoint.
        """
        own = {name: getattr(self.args, name) for name in ("output_dir", "seed")}
        self.args.output_dir, self.args.seed = output_dir, seed
        self.train_dataset = self._reader.train(train_dataset)
        self.data_collator.temperature = self._reader.sampling_temperature(self.train_dataset)
        self.optimizer = None
        self.train(resume_from_checkpoint="auto")
        for name, value in own.items():
            setattr(self.args, name, value)
        return self.state.log_history

    def _describe_run(self) -> dict[str, Any]:
        """All that decides the weights, as JSON values, the same on every rank and for any number of ranks."""
        adapters = getattr(self.model, "peft_config", {})
        return {
            "data": self.train_dataset.digest if self.train_dataset is not None else None,
            **self.args.run_settings(self.accelerator.num_processes),
            "block_size": self._reader.diffusion_model.block_size,
            "adapter": [describe_adapter(adapter) for adapter in adapters.values()],
        }

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> EpochSampler:
        shuffle = self.args.train_sampling_strategy != "sequential"
        together = self._together(self._train_batch_size)
        self._sampler = EpochSampler(len(self.train_dataset), self.args.seed, shuffle, together)
        self.remove_callback(FollowEpoch)  # of an earlier training
        self.add_callback(FollowEpoch(self._sampler))
        return self._sampler

    def _get_eval_sampler(self, eval_dataset: Dataset) -> EpochSampler:
        together = self._together(self.args.eval_batch_size)
        return EpochSampler(len(eval_dataset), self.args.seed, shuffle=False, multiple_of=together)

    def _together(self, batch_size: int) -> int:
        """How many records all processes take at once; 1 if a short last batch is possible or dropped."""
        processes = self.accelerator.num_processes
        return 1 if processes == 1 or self.args.dataloader_drop_last else batch_size * processes

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Tensor]], device: torch.device
    ) -> dict[str, Tensor]:
        """The denominators of the loss over all micro-batches of a step and all ranks.

        `num_batches` counts the micro-batches that have a row of loss. The ranks that have got SIGTERM are counted in
        the same exchange.
        """
        counts = {name: sum(batch[name].to(device) for batch in batch_samples) for name in DENOMINATORS}
        counts["num_batches"] = torch.tensor(sum(len(batch["rows"]) > 0 for batch in batch_samples), device=device)
        counts["terminated"] = torch.tensor(int(termination.is_requested), device=device)
        counts = self.accelerator.reduce(counts, reduction="sum")
        self._ranks_terminated = counts.pop("terminated")
        return counts

    def _is_terminated(self) -> bool:
        return bool(self._ranks_terminated)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Tensor | None = None) -> Tensor | float:
        """The norm as transformers computes it; also checks losses and gradient before the optimizer's step."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        losses, self._losses = self._losses, []
        check_step(losses, grad_norm, self.state.global_step + 1, self._records_of, self.accelerator)
        return grad_norm

    def _records_of(self, rank: int) -> list[int]:
        """The indices of the records that a rank reads for the current step; of a stream, their places in it."""
        batch_size = self._train_batch_size
        processes, accumulation = self.accelerator.num_processes, self.args.gradient_accumulation_steps
        if isinstance(self.train_dataset, TrajectoryStream):
            blocks = range(self.state.global_step * accumulation, (self.state.global_step + 1) * accumulation)
            starts = [(block * processes + rank) * batch_size for block in blocks]
            return [start + place for start in starts for place in range(batch_size)]
        keys = list(self._sampler)
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
        """This micro-batch's share of the loss; `num_items_in_batch` holds the global denominators."""
        processes = self.accelerator.num_processes
        if self.args.loss_average == "global_batch":
            inputs = {**inputs, **{name: num_items_in_batch[name] for name in DENOMINATORS}}
            share = 1.0
        else:  # the collator's denominators are those of the micro-batch
            share = 1 / num_items_in_batch["num_batches"].clamp(min=1)
        will_log = model.training and (self.state.global_step + 1) % self.state.logging_steps == 0
        auxiliary_share = 0.0  # an evaluation is of the tokens alone
        if model.training:
            is_global = self.args.loss_average == "global_batch"
            auxiliary_share = 1 / (self.current_gradient_accumulation_steps * processes) if is_global else 1.0
        output = model(**inputs, auxiliary_share=auxiliary_share, return_entropy=will_log)
        if model.training:
            self._losses.append(output.loss.detach())
            self._loss_terms.add_loss(output, share, 1 / self.current_gradient_accumulation_steps)
            if "old_logprobs" in inputs:
                self._loss_terms.add_ratios(output.logprobs, inputs, self.args.clip)
        if will_log:
            self._loss_terms.add_entropy(output.entropy, inputs["steps"], inputs["cu_seqlens"])
        loss = output.loss * share  # the loss is the sum of these over micro-batches and ranks
        # Data parallelism averages gradients over the ranks, so the factor makes them a sum.
        loss = loss * processes if model.training else self.accelerator.reduce(loss, reduction="sum")
        return (loss, output) if return_outputs else loss

    def get_eval_dataloader(self, eval_dataset: str | Records | None = None) -> DataLoader:
        """Batches of a data set, of the one of this name in `eval_dataset`, or of `eval_dataset`."""
        if isinstance(eval_dataset, str | None):
            return super().get_eval_dataloader(eval_dataset)
        # Not `get_eval_dataloader`, which returns the workers of the trainer's own data set where they persist.
        return super().get_test_dataloader(self._reader.evaluate(eval_dataset))

    def get_test_dataloader(self, test_dataset: Records) -> DataLoader:
        """Batches of a data set, for `predict`."""
        return super().get_test_dataloader(self._reader.evaluate(test_dataset, "test_dataset"))

    def evaluate(
        self,
        eval_dataset: str | Records | dict[str, Records] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The figures of a data set, of each of several, or of the trainer's own with the accuracy on `eval_prompts`.

        Args:
            eval_dataset: a data set, several by name, or the name of one of the trainer's own; None: all of its own.
            ignore_keys: without effect, because the logits are never computed.
            metric_key_prefix: the beginning of the figures' names, before the name of a data set.

        Raises:
            FloatingPointError: the logits are not finite; names the cause.
        """
        is_own = eval_dataset is None and self.eval_prompts is not None
        are_several = isinstance(self.eval_dataset, dict)
        self._decodes_prompts = is_own and not are_several
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._decodes_prompts = False
        if is_own and are_several:  # once for all of them
            accuracy = self._accuracy_on_prompts(metric_key_prefix)
            self.log(accuracy)
            metrics |= accuracy
        return metrics

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """The loss on trajectories, and the accuracy on `eval_prompts` where `evaluate` asks for it.

        Raises:
            FloatingPointError: the logits are not finite; names the cause.
        """
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if not isfinite(output.metrics.get(f"{metric_key_prefix}_loss", 0.0)):
            raise logits_not_finite(self.accelerator.unwrap_model(self.model))
        if self._decodes_prompts:
            output.metrics.update(self._accuracy_on_prompts(metric_key_prefix))
        return output

    def _accuracy_on_prompts(self, metric_key_prefix: str) -> dict[str, float]:
        """The accuracy of the responses to `eval_prompts`, and how many of them could be checked."""
        model = describe(self.accelerator.unwrap_model(self.model), self.processing_class)
        prompts = self.eval_prompts.share(self.args.process_index, self.args.world_size)
        counts = torch.tensor(count_right(model, prompts, self.eval_sampler), device=self.args.device)
        right, checked = self.accelerator.reduce(counts, reduction="sum").tolist()
        accuracy = {f"{metric_key_prefix}_accuracy": right / checked} if checked else {}
        return {**accuracy, f"{metric_key_prefix}_checked_answers": checked}

    def create_model_card(self, model_name: str | None = None, **kwargs: Any) -> None:
        """Writes README.md with method, data, settings and results; `push_to_hub` calls it too."""
        if not self.is_world_process_zero():
            return
        model = self.accelerator.unwrap_model(self.model)
        base = model.config.name_or_path or "random weights"
        name = model_name or Path(self.hub_model_id or self.args.output_dir).name
        origins = self.train_dataset.count_origins() if self.train_dataset is not None else Counter()
        card = model_card(
            name,
            base,
            {**self._describe_run(), "epochs": self.state.epoch, "steps": self.state.global_step},
            origins,
            self.state.log_history,
            self.state.global_step if self._loaded_step is None else self._loaded_step,
            self.args.eval_prompts,
        )
        card.save(Path(self.args.output_dir) / "README.md")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the loss terms since the last log, and the entropies of the logging step.

        Figures that are not finite are left out, because trainer_state.json keeps all figures and JSON has no such
        number: with fp16 the gradient's norm overflows in a step that the gradient scaler skips.
        """
        if "loss" in logs:
            logs |= self._loss_terms.take(self.accelerator)
        finite = {name: value for name, value in logs.items() if not isinstance(value, float) or isfinite(value)}
        super().log(finite, start_time)


def describe_adapter(adapter: Any) -> dict[str, Any]:
    """A peft config as JSON values, without the path of its base."""
    settings = json.loads(json.dumps(adapter.to_dict(), default=sorted))
    return {
        name: value for name, value in settings.items() if name not in ("base_model_name_or_path", "inference_mode")
    }
