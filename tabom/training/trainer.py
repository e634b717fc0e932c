"""`TabomTrainer`: transformers' Trainer with trajectories for data and the TABOM loss in the model's forward."""

import json
import logging
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput, rotate_checkpoints

from tabom.data.prompts import PromptSet
from tabom.data.trajectories import Trajectory
from tabom.evaluation.answers import count_right
from tabom.evaluation.metrics import count_pairs_in_order
from tabom.models.diffusion_model import DiffusionModel, describe
from tabom.models.loading import as_diffusion_model
from tabom.sampling.sampler import SamplerConfig
from tabom.training.card import model_card
from tabom.training.checkpoints import SAVING, check_same_run, newest_whole, publish
from tabom.training.collator import DENOMINATORS, FILLER, EpochSampler, TrajectoryCollator, TrajectoryDataset
from tabom.training.config import TabomConfig
from tabom.training.finite import check_step, check_weights
from tabom.training.forward import LossOutput, add_loss_to_forward

logger = logging.getLogger(__name__)


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
        model: a name or folder, what `tabom.load` makes of it (for another dtype or attention), or a model of
            transformers with bidirectional attention.
        args: a `TabomConfig`; default: its defaults, into the folder `<model>-TABOM`.
        train_dataset: trajectories: a `datasets.Dataset` or a list of records in any spelling that `parse_trajectory`
            reads, or of `Trajectory`. A data set is tokenized once; other ranks and later runs find it in the cache.
            What `tabom.data.tokenized.tokenize` made is taken as it is.
        eval_dataset: the same.
        eval_prompts: answered and judged at every evaluation, for the figure `eval_accuracy`; every process answers its
            share.
        eval_sampler: how they are decoded; default: greedily, one token a step.
        processing_class: the tokenizer; default: that of the model's name or folder. Saved beside the model.
        peft_config: trains an adapter of the model instead of its weights (needs peft). A model that was loaded with
            an adapter trains that one.
        kwargs: the other arguments of `transformers.Trainer`.

    Raises:
        ValueError: several GPUs in one process, a tokenizer that is neither given nor to be found, a second adapter,
            records longer than the model's table of positions, or a model that `load` or `describe` refuses.
    """

    def __init__(
        self,
        model: str | Path | DiffusionModel | PreTrainedModel,
        args: TabomConfig | None = None,
        train_dataset: datasets.Dataset | Sequence[dict[str, Any] | Trajectory] | None = None,
        eval_dataset: datasets.Dataset | Sequence[dict[str, Any] | Trajectory] | None = None,
        eval_prompts: PromptSet | None = None,
        eval_sampler: SamplerConfig | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        family = as_diffusion_model(model, processing_class)
        model, processing_class = family.model, family.tokenizer
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
                "merge this one into its base and save that (peft's merge_and_unload)"
            )
        add_loss_to_forward(model, **args.loss_settings)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)

        def dataset(name: str, source: Any) -> TrajectoryDataset | None:
            if source is None:
                return None
            with args.main_process_first(desc="tokenizing"):  # the others find it in the cache
                examples = TrajectoryDataset(
                    source,
                    processing_class,
                    args.objective_settings,
                    args.seed,
                    vocab_size=family.model.config.vocab_size,
                    **args.tokenizing_settings(family.pad_token_id),
                )
            check_positions(name, examples.longest, family)
            return examples

        super().__init__(
            model=model,
            args=args,
            data_collator=TrajectoryCollator(family.mask_token_id, family.pad_token_id, family.logits_shift),
            train_dataset=dataset("train_dataset", train_dataset),
            eval_dataset=dataset(
                "eval_dataset", [] if eval_dataset is None and eval_prompts is not None else eval_dataset
            ),
            processing_class=processing_class,
            **kwargs,
        )
        self.eval_prompts = eval_prompts
        self.eval_sampler = eval_sampler or SamplerConfig()
        self._saving_in: Path | None = None
        self._loaded_step: int | None = None  # of the checkpoint whose weights were loaded at the end
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
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is not None and plugin.zero_stage == 3 and not plugin.zero3_save_16bit_model:
            raise ValueError(
                "deepspeed: ZeRO-3 without stage3_gather_16bit_weights_on_model_save (zero3_save_16bit_model in a "
                "config of accelerate) saves no model that loads; set it to true"
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
        self._loaded_step = None
        return super().train(resume_from_checkpoint=self._find_checkpoint(resume_from_checkpoint), **kwargs)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._loaded_step = self.state.best_global_step

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
            "data": self.train_dataset.digest if self.train_dataset is not None else None,
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
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(final))
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(folder), self.args.save_total_limit, best_model_checkpoint=best)
        self.accelerator.wait_for_everyone()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As transformers', with the model card, and of whole checkpoints: not of one that is being written."""
        if self._saving_in is None:
            self.create_model_card()
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model as it loads back, whole, and pushes it if `push_to_hub` is set.

        A checkpoint of a sharded run may hold shards instead.
        """
        check_weights(self.model, self.accelerator)
        if self.is_fsdp_enabled and not _internal_call:
            self._save(output_dir or self.args.output_dir, state_dict=self.accelerator.get_state_dict(self.model))
            if self.args.push_to_hub:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
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


def check_positions(name: str, longest: int, family: DiffusionModel) -> None:
    """Warns of records longer than a model was made for; rotary positions at least go on there.

    Raises:
        ValueError: positions that a table holds end.
    """
    if family.positions is None or longest <= family.positions:
        return
    message = (
        f"{name}: a record of {longest} tokens, and the model has {family.positions} positions "
        "(max_position_embeddings); shorten records by max_prompt_length and max_response_length"
    )
    if getattr(family.model.config, "rope_parameters", None) is None:
        raise ValueError(message)
    logger.warning(message)


def describe_adapter(adapter: Any) -> dict[str, Any]:
    """JSON of a peft config, without the path of its base."""
    settings = json.loads(json.dumps(adapter.to_dict(), default=sorted))
    return {
        name: value for name, value in settings.items() if name not in ("base_model_name_or_path", "inference_mode")
    }
