"""`tabom train --dry_run`: times a recipe's training steps on made-up data.

The architecture is the real one, at real size or scaled down; nothing is downloaded. The answers are meaningless, the
times and the memory are those of a real run.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import send_to_device
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, TrainerCallback

from tabom.data import limits
from tabom.data.trajectories import Trajectory
from tabom.lab.model import character_tokenizer
from tabom.models.diffusion_model import DiffusionModel, describe
from tabom.models.families import ADAPTABLE, FAMILIES, native_config
from tabom.models.layout import forward_of_blocks
from tabom.models.loading import check_is_there, path_of
from tabom.training.config import TabomConfig
from tabom.training.released import released_loss
from tabom.training.trainer import TabomTrainer

DREAM_7B = {
    "model_type": "Dream",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "pad_token_id": 151643,
    "eos_token_id": 151643,
}
LLADA_8B = {
    "model_type": "llada",
    "vocab_size": 126464,
    "d_model": 4096,
    "mlp_hidden_size": 12288,
    "n_layers": 32,
    "n_heads": 32,
    "max_sequence_length": 4096,
    "rope_theta": 500000.0,
    "pad_token_id": 126081,
    "eos_token_id": 126081,
}
SDAR_4B = {
    "model_type": "sdar",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "block_size": 4,
    "pad_token_id": 151643,
    "eos_token_id": 151643,
}
LLADA2_MINI = {
    "model_type": "llada2_moe",
    "vocab_size": 157184,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 600000.0,
    "partial_rotary_factor": 0.5,
    "tie_word_embeddings": False,
    "pad_token_id": 156892,
    "eos_token_id": 156892,
}
PUBLISHED = {
    "Dream-org/Dream-v0-Base-7B": DREAM_7B,
    "Dream-org/Dream-v0-Instruct-7B": DREAM_7B,
    "GSAI-ML/LLaDA-8B-Base": LLADA_8B,
    "GSAI-ML/LLaDA-8B-Instruct": LLADA_8B,
    "JetLM/SDAR-4B-Chat": SDAR_4B,
    "inclusionAI/LLaDA2.0-mini": LLADA2_MINI,
}
"""The settings of the published config.json files, so that a dry run needs no network."""

TINY = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "n_routed_experts": 16,
    "moe_intermediate_size": 32,
    "mask_token_id": 2047,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
DEFAULT_STEPS = 3
COMPARED_ROUNDS = 5


def random_model(
    name: str | None,
    scale: Literal["full", "tiny"],
    dtype: torch.dtype,
    attn_implementation: str | None,
    device: torch.device,
) -> DiffusionModel:
    """A model of the architecture of `name`, with random weights made on the device, and the lab's tokenizer.

    Args:
        name: one of PUBLISHED, or a folder with a config.json of a known family or of a model that was saved here.

    Raises:
        ValueError: another family.
    """
    settings = PUBLISHED.get(name)
    if settings is None and name is not None:
        check_is_there(name)
        settings = PreTrainedConfig.get_config_dict(path_of(name))[0]
    settings = settings or {}
    if settings.get("model_type") in FAMILIES:
        config = native_config(settings)
    elif settings.get("model_type") in ADAPTABLE and "mask_token_id" in settings:
        config = AutoConfig.from_pretrained(path_of(name))
    else:
        raise ValueError(
            f"model={name}: expected {', '.join(PUBLISHED)}, a model that this library saved, or a folder whose "
            f"config.json has a model_type of {' or '.join(FAMILIES)}"
        )
    if scale == "tiny":
        config.update(TINY)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    return describe(model, character_tokenizer())


def make_up_trajectories(count: int, vocab_size: int, prompt_length: int, response_length: int) -> list[Trajectory]:
    """Prompts of random digits and responses of random tokens, decoded in a random order."""
    rng = np.random.default_rng(0)
    return [
        Trajectory(
            prompt="".join(map(str, rng.integers(0, 10, prompt_length))),
            response="",
            response_token_ids=rng.integers(4, vocab_size - 1, response_length).tolist(),
            decoding_order=rng.permutation(response_length).tolist(),
            non_ltr_positions=list(range(response_length // 2)),
        )
        for _ in range(count)
    ]


def train_only(model: PreTrainedModel, layers: Sequence[str]) -> PreTrainedModel:
    """Freezes all layers but those of these names, which are trained in place of an adapter if peft is missing."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[-2] in layers)
    return model


class StepTimer(TrainerCallback):
    """Measures the seconds of every optimizer step, including the transfer of the data to the device."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: TabomConfig, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = now(args.device)

    def on_step_end(self, args: TabomConfig, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(now(args.device) - self.start)


def dry_run(diffusion_model: DiffusionModel, config: TabomConfig, peft_config: Any = None) -> None:
    """Trains a few steps and prints the time of a step, the loss's share of it, and the time of the released loss."""
    if config.max_steps < 1:
        config.max_steps = DEFAULT_STEPS
    config.save_strategy = "no"
    config.report_to = []
    prompt_length, response_length = config.max_prompt_length or 256, config.max_response_length or 256
    micro_batches = config.max_steps * config.gradient_accumulation_steps
    timer = StepTimer()
    trainer = TabomTrainer(
        model=diffusion_model.model,
        args=config,
        train_dataset=make_up_trajectories(
            config.train_batch_size * micro_batches * config.world_size,
            diffusion_model.model.config.vocab_size,
            prompt_length,
            response_length,
        ),
        processing_class=diffusion_model.tokenizer,
        peft_config=peft_config,
        callbacks=[timer],
    )
    trainer.train()
    memory = peak_memory(config.device)
    seconds = timer.seconds[1:] or timer.seconds  # the first one compiles and allocates
    sequences = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
    step = statistics.median(seconds)

    model_type = diffusion_model.model.config.model_type
    table = Table(
        show_header=False,
        title=f"{model_type}, random weights, {device_name(config.device)}",
    )
    table.add_row("parameters", f"{sum(p.numel() for p in diffusion_model.model.parameters()):,}")
    table.add_row("step", f"{spread(seconds)} s, of {len(seconds)} steps after the first")
    table.add_row("", f"{sequences} sequences of {prompt_length} + {response_length} tokens")
    table.add_row("tokens a second", f"{sequences * (prompt_length + response_length) / step:,.0f}")
    table.add_row(
        "peak memory", f"{memory / 2**30:.2f} GiB{'' if config.device.type == 'cuda' else ', of the process'}"
    )
    for name, text in compare_losses(trainer).items():
        table.add_row(name, text)
    if trainer.is_world_process_zero():
        Console().print(table)


def compare_losses(trainer: TabomTrainer) -> dict[str, str]:
    """Times forward and backward of a micro-batch with the trainer's loss and with the released one, in turns."""
    model, device = trainer.model, trainer.args.device
    examples = [trainer.train_dataset[0, index] for index in range(trainer.args.train_batch_size)]
    batch = send_to_device(trainer.data_collator(examples), device)
    names = ("input_ids", "attention_mask", "position_ids", "is_noisy")
    inputs = {name: batch[name] for name in names if name in batch}
    bare = trainer.accelerator.unwrap_model(model)
    forward = model
    if "is_noisy" in inputs:
        forward = partial(forward_of_blocks, bare, model, bare.config.block_size)
    packed = [batch[name] for name in ("rows", "labels", "steps", "cu_seqlens")]
    settings = {"margin": trainer.args.rank_margin, "rank_weight": trainer.args.rank_weight}

    def with_own_loss() -> torch.Tensor:
        return model(**batch).loss

    def with_released_loss() -> torch.Tensor:
        return released_loss(forward(**inputs).logits, *packed, **settings)

    seconds: dict[Callable[[], torch.Tensor], list[float]] = {with_own_loss: [], with_released_loss: []}
    shares, peaks = [], {}
    head = bare.get_output_embeddings()
    for round in range(COMPARED_ROUNDS + 1):
        for loss, times in seconds.items():
            model.zero_grad()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with timed(head, device) as seconds_in_head, trainer.compute_loss_context_manager():
                start = now(device)
                loss().backward()
                took = now(device) - start
            if round > 0:
                times.append(took)
                peaks[loss] = peak_memory(device)
                if loss is with_own_loss:
                    shares.append(sum(seconds_in_head) / took)
    model.zero_grad()
    own, released = (statistics.median(times) for times in seconds.values())
    rows = {"one micro-batch, forward + backward": f"{spread(seconds[with_own_loss])} s"}
    if trainer.args.fused_linear:
        rows["of it head and loss"] = f"{100 * statistics.median(shares):.1f} %"
    rows["with the released loss"] = f"{spread(seconds[with_released_loss])} s, {released / own:.2f} times as long"
    if device.type == "cuda":
        rows["peak memory of the two"] = " and ".join(f"{peaks[loss] / 2**30:.2f} GiB" for loss in seconds)
    return rows


@contextmanager
def timed(module: torch.nn.Module, device: torch.device) -> Iterator[list[float]]:
    """Measures the seconds of each forward of a module; the head's includes the fused loss and its gradient."""
    starts: list[float] = []
    seconds: list[float] = []
    before = module.register_forward_pre_hook(lambda *_: starts.append(now(device)))
    after = module.register_forward_hook(lambda *_: seconds.append(now(device) - starts[-1]))
    yield seconds
    before.remove()
    after.remove()


def now(device: torch.device) -> float:
    """The time in seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device: torch.device) -> int:
    """The peak memory in bytes: of the allocator on a GPU, elsewhere of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return limits.peak_memory()


def spread(seconds: list[float]) -> str:
    """The median, smallest and largest value as text."""
    return f"{statistics.median(seconds):.3g} ({min(seconds):.3g} to {max(seconds):.3g})"


def device_name(device: torch.device) -> str:
    """The name of the device that the figures belong to."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
