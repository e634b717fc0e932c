"""A Trainer of transformers whose checkpoints are complete or absent, finite, and continued by the same run only."""

import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from tabom.models.progress import bars_of_long_waits
from tabom.models.writing import naming_full_disk
from tabom.sampling.termination import Terminated, termination
from tabom.training.checkpoints import SAVING, check_same_run, check_whole, newest_first, publish
from tabom.training.nan_checks import check_weights

logger = logging.getLogger(__name__)


class SaveAtSigterm(TrainerCallback):
    """Saves a checkpoint after the step in which a rank got SIGTERM, and ends the process.

    transformers' just-in-time checkpoint does this for one process. It is not used, because each rank would save at the
    step in which it notices the signal itself, whereas saving takes all ranks at once and often one machine alone gets
    the signal; and because it may save in the middle of a step, from which training does not continue exactly.
    """

    def __init__(self, trainer: "CheckpointingTrainer") -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.trainer._is_terminated():
            control.should_save = True
            control.should_evaluate = False  # which may take longer than the grace period

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.trainer._is_terminated():
            raise Terminated(f"the checkpoint of step {state.global_step} is saved")


class CheckpointingTrainer(Trainer, ABC):
    """Writes each checkpoint aside and renames it when it is complete; resumes from complete ones of the same run."""

    _saving_in: Path | None = None  # the folder that a checkpoint is being written to
    _loaded_step: int | None = None  # of the checkpoint whose weights were loaded when training ended

    @abstractmethod
    def _describe_run(self) -> dict[str, Any]:
        """All that decides the weights, as JSON values, the same on every rank; a checkpoint is resumed with it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(SaveAtSigterm(self))

    @abstractmethod
    def _is_terminated(self) -> bool:
        """Whether a rank had got SIGTERM when the current step began, the same on every rank."""

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Trains from a complete checkpoint of the same run, or from the start.

        Args:
            resume_from_checkpoint: a folder; True: the newest complete one of `output_dir`; "auto": the same, or a
                fresh start where there is none.

        Raises:
            ValueError: the checkpoint is not complete, or belongs to a run that `_describe_run` tells from this one.
            Terminated: SIGTERM came; a checkpoint is saved.
        """
        self._loaded_step = None
        checkpoint = self._find_checkpoint(resume_from_checkpoint)
        with termination.deferred():
            return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._loaded_step = self.state.best_global_step

    def _find_checkpoint(self, resume: str | bool | None) -> str | None:
        """The checkpoint to resume, the same on every rank; None: start anew."""
        if not resume:
            return None
        is_search = resume is True or resume == "auto"
        found = newest_first(self.args.output_dir) if is_search else [Path(resume)]
        for checkpoint in broadcast_object_list([found])[0]:
            problem = self._damage(checkpoint)
            if problem is None:
                check_same_run(checkpoint, self._describe_run())
                return str(checkpoint)
            if not is_search:
                raise ValueError(problem)
            if self.is_world_process_zero():
                logger.warning("passed over: %s", problem)
        if resume is True:
            raise ValueError(
                f"resume_from_checkpoint=True: no whole checkpoint in {self.args.output_dir}; 'auto' starts anew"
            )
        return None

    def _damage(self, checkpoint: Path) -> str | None:
        """What is wrong with a checkpoint, the same on every rank; only ranks that write checkpoints read them."""
        problem = None
        if self.args.should_save:
            try:
                check_whole(checkpoint)
            except ValueError as error:
                problem = str(error)
        return next(filter(None, gather_object([problem])), None)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._saving_in or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Writes the checkpoint to a folder aside and renames it; refuses weights that are not finite."""
        check_weights(model, self.accelerator)
        folder = Path(self._get_output_dir(trial))
        with naming_full_disk(folder):
            self._write_checkpoint(folder, model, trial)

    def _write_checkpoint(self, folder: Path, model: torch.nn.Module, trial: Any) -> None:
        written, final = (
            path / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}" for path in (folder / SAVING, folder)
        )
        if self.args.should_save:
            shutil.rmtree(folder / SAVING, ignore_errors=True)  # left by a killed run
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
        """Pushes as transformers does, with the model card, but only complete checkpoints."""
        if self._saving_in is None:
            self.create_model_card()
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the whole model so that it can be loaded, and pushes it if `push_to_hub` is set.

        A checkpoint of a sharded run, in contrast, may hold shards.
        """
        check_weights(self.model, self.accelerator)
        if self.is_fsdp_enabled and not _internal_call:
            self._save(output_dir or self.args.output_dir, state_dict=self.accelerator.get_state_dict(self.model))
            if self.args.push_to_hub:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Saves as transformers does, but in a checkpoint under the names that the weights have in memory.

        transformers renames and splits the weights of some models, such as the experts of a mixture, while it saves and
        loads them. Its Trainer resumes from a file of weights without that, and would leave such weights as they are.
        """
        own_names = own_weight_names(self.accelerator.unwrap_model(self.model)) if self._saving_in else nullcontext()
        with bars_of_long_waits(), own_names:
            super()._save(output_dir, state_dict)


@contextmanager
def own_weight_names(model: torch.nn.Module) -> Iterator[None]:
    """Lets `save_pretrained` write the weights under the names that they have in memory."""
    conversions = vars(model).get("_weight_conversions")
    model._weight_conversions = []
    try:
        yield
    finally:
        model._weight_conversions = conversions
