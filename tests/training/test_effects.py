"""Every setting of transformers' Trainer has its effect in ours, or is refused by name with the remedy."""

import inspect
from dataclasses import fields

import pytest
import transformers
from accelerate import ParallelismConfig
from transformers import Trainer, TrainingArguments

from tabom.cli.main import main
from tabom.training.config import FIXED
from tabom.training.trainer import REFUSED, TabomTrainer
from tests.conftest import random_model
from tests.training.test_trainer import config, make_trajectories

PARTLY = {"train_sampling_strategy", "accelerator_config", "use_liger_kernel", "liger_kernel_config"}
PARTLY |= {"parallelism_config"}
"""Settings of which some values are refused."""

FOR_SCRIPTS = {"do_train", "do_eval", "do_predict", "local_rank"}
"""Settings that transformers' Trainer does not read either."""

WORKING = """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim_target_modules gradient_accumulation_steps max_grad_norm bf16 fp16 bf16_full_eval fp16_full_eval tf32
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    torch_compile torch_compile_backend torch_compile_mode use_cache neftune_noise_alpha torch_empty_cache_steps
    auto_find_batch_size logging_strategy logging_steps logging_first_step log_on_each_node
    include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project
    trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay
    per_device_eval_batch_size eval_on_start eval_accumulation_steps save_only_model save_strategy save_steps
    save_on_each_node save_total_limit push_to_hub hub_token hub_private_repo hub_model_id
    hub_strategy hub_always_push hub_revision load_best_model_at_end metric_for_best_model greater_is_better
    ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed use_cpu dataloader_drop_last
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order ddp_find_unused_parameters ddp_bucket_cap_mb
    ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed debug
    skip_memory_metrics resume_from_checkpoint
"""
"""Settings that `transformers.Trainer` or accelerate carry out in code that `TabomTrainer` leaves as it is."""

CALLED = {"self", "model", "args", "train_dataset", "eval_dataset", "processing_class", "callbacks", "optimizers"}
CALLED |= {"optimizer_cls_and_kwargs"}


def test_every_setting_of_transformers_was_thought_of():
    names = {each.name for each in fields(TrainingArguments)}
    assert names - set(WORKING.split()) - FIXED.keys() - PARTLY - FOR_SCRIPTS == set(), transformers.__version__
    assert set(inspect.signature(Trainer.__init__).parameters) - CALLED - REFUSED.keys() == set()


CHANGED = {
    "label_smoothing_factor": 0.1,
    "average_tokens_across_devices": False,
    "logging_nan_inf_filter": True,
    "remove_unused_columns": True,
    "label_names": ["targets"],
    "length_column_name": "tokens",
    "data_seed": 3,
    "enable_jit_checkpoint": True,
    "prediction_loss_only": False,
    "include_for_metrics": ["inputs"],
    "batch_eval_metrics": True,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
}


@pytest.mark.parametrize("name", FIXED)
def test_a_setting_without_effect_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"^{name}=.*: expected .*, because ") as error:
        config(tmp_path, **{name: CHANGED[name]})
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "settings, problem",
    [
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy='group_by_length': expected random"),
        ({"train_sampling_strategy": "batch_rebalance"}, "train_sampling_strategy='batch_rebalance': expected random"),
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config split_batches=True: expected False"),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config dispatch_batches=True: expected"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True would replace the loss"),
        ({"parallelism_config": ParallelismConfig(cp_size=2)}, "parallelism_config cp_size: expected 1"),
    ],
)
def test_a_value_that_would_be_wrong_is_refused(tmp_path, settings, problem):
    with pytest.raises(ValueError) as error:
        config(tmp_path, **settings)
    assert str(error.value).startswith(problem) and len(str(error.value).splitlines()) == 1


def test_liger_s_other_kernels_are_allowed(tmp_path):
    options = {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": False}}
    assert config(tmp_path, **options).use_liger_kernel


@pytest.mark.parametrize("name", REFUSED)
def test_an_argument_without_effect_is_refused(tmp_path, rng, name):
    model, records = random_model(3), make_trajectories(rng, 2)
    options = {"args": config(tmp_path), "train_dataset": records, "processing_class": model.tokenizer}
    with pytest.raises(ValueError, match=f"^{name}: not used by TabomTrainer, because "):
        TabomTrainer(model=model.model, **options, **{name: lambda *args: None})
    TabomTrainer(model=model.model, **options, **{name: None})


def test_the_command_line_says_it_in_one_line(tmp_path, capsys):
    arguments = ["train", "--data", str(tmp_path), "--output_dir", str(tmp_path / "run"), "--use_cpu", "true"]
    assert main([*arguments, "--label_smoothing_factor", "0.1"]) == 2
    error = capsys.readouterr().err
    assert "label_smoothing_factor=0.1: expected 0.0" in error and len(error.splitlines()) == 1
