"""A training step with the loss as released, by `reference`, and fused: time, memory, and the loss's share.

    python -m benchmarks.trainer

LoRA on q_proj and v_proj, AdamW, a micro-batch as in the recipes; the ways take turns on the same model and batch. On a
GPU also the largest batch that each way fits. Writes benchmarks/results/trainer-<device>.json.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from accelerate.utils import send_to_device
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.tools.measure import (
    Contender,
    environment,
    is_gpu,
    peak_memory_of,
    result_name,
    this_device,
    time_interleaved,
    write_json,
)
from benchmarks.tools.models import random_dream
from tabom.lab.dry_run import make_up_trajectories, now, timed, train_only
from tabom.models.diffusion_model import DiffusionModel
from tabom.training.collator import TrajectoryCollator
from tabom.training.examples import TrajectoryDataset
from tabom.training.forward import add_loss_to_forward
from tabom.training.objectives import ObjectiveSettings
from tabom.training.released import released_loss

SETTINGS = {"form": "hinge", "margin": 0.1, "rank_weight": 1.0}
LORA = {"r": 16, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
Batch = dict[str, Tensor]


class Training:
    """A model under LoRA whose loss can be computed in several ways."""

    def __init__(self, diffusion_model: DiffusionModel) -> None:
        self.diffusion_model, model = diffusion_model, diffusion_model.model
        plain = model.forward
        self.forwards = {"released": plain}
        for name, options in {
            "reference": {"fused_linear": False, "backend": "reference"},
            "ours, logits": {"fused_linear": False},
            "ours, fused": {},
        }.items():
            model.forward = plain
            add_loss_to_forward(model, **SETTINGS, **options)
            self.forwards[name] = model.forward
        self.wrapped = add_adapter(model).train()
        self.optimizer = torch.optim.AdamW(p for p in self.wrapped.parameters() if p.requires_grad)

    def step(self, way: str, batch: Batch) -> None:
        """Forward, backward, update."""
        self.diffusion_model.model.forward = self.forwards[way]
        self.optimizer.zero_grad()
        self.loss(way, batch).backward()
        self.optimizer.step()

    def loss(self, way: str, batch: Batch) -> Tensor:
        """Under the forward that `way` has."""
        if way != "released":
            return self.wrapped(**batch).loss
        logits = self.wrapped(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        packed = (batch[name] for name in ("rows", "labels", "steps", "cu_seqlens"))
        return released_loss(logits, *packed, margin=SETTINGS["margin"], rank_weight=SETTINGS["rank_weight"])


def add_adapter(model: torch.nn.Module) -> torch.nn.Module:
    """LoRA on q_proj and v_proj; without peft these layers themselves are trained, and all others frozen."""
    if find_spec("peft") is None:
        return train_only(model, LORA["target_modules"])
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(**LORA))


def make_batch(model: DiffusionModel, sequences: int, prompt: int, response: int, window: int) -> Batch:
    """A micro-batch of made-up trajectories."""
    trajectories = make_up_trajectories(sequences, model.model.config.vocab_size, prompt, response)
    settings = ObjectiveSettings(supervised_window=window, rank_window=window)
    dataset = TrajectoryDataset(trajectories, model.tokenizer, settings, seed=0)
    collate = TrajectoryCollator(model.mask_token_id, model.pad_token_id, model.logit_rows)
    batch = collate([dataset[0, index] for index in range(sequences)])
    return send_to_device(batch, model.device)


def check_agreement(training: Training, batch: Batch) -> None:
    """All ways give the same loss."""
    losses = {}
    for way, forward in training.forwards.items():
        training.diffusion_model.model.forward = forward
        losses[way] = training.loss(way, batch).item()
    expected = losses["reference"]
    assert all(abs(loss - expected) < 1e-2 * abs(expected) for loss in losses.values()), losses


def share_of_head_and_loss(training: Training, batch: Batch) -> float:
    """Of a step with the fused loss."""
    device = training.diffusion_model.device
    start = now(device)
    with timed(training.diffusion_model.model.get_output_embeddings(), device) as seconds:
        training.step("ours, fused", batch)
    return sum(seconds) / (now(device) - start)


def largest_batch(step: Callable[[int], None]) -> int:
    """The most sequences, a power of two, that do not run out of memory."""
    fits = 0
    for exponent in range(12):
        try:
            step(2**exponent)
        except torch.OutOfMemoryError:
            break
        finally:
            torch.cuda.empty_cache()
        fits = 2**exponent
    return fits


def main() -> None:
    """Measure on this machine."""
    torch.manual_seed(0)
    device = this_device()
    name, diffusion_model = random_dream(device)
    training = Training(diffusion_model)
    sizes = (8, 256, 256, 32) if is_gpu(device) else (4, 64, 64, 16)
    batch = make_batch(diffusion_model, *sizes)
    check_agreement(training, batch)
    contenders = [Contender(way, [lambda w=way: training.step(w, batch)], capture=False) for way in training.forwards]
    timings = time_interleaved(contenders, device, rounds=10 if is_gpu(device) else 5)
    share = share_of_head_and_loss(training, batch)
    records = []
    for contender in contenders:
        record = {"way": contender.name, "seconds": timings[contender.name, "eager"]._asdict()}
        record["peak_bytes"] = peak_memory_of(contender.calls[0], device)
        if is_gpu(device):
            record["largest_batch"] = largest_batch(
                lambda n, w=contender.name: training.step(w, make_batch(diffusion_model, n, *sizes[1:]))
            )
        records.append(record)
    shape = dict(zip(("sequences", "prompt", "response", "window"), sizes, strict=True))
    found = environment(device) | {"model": name, "shape": shape, "share_of_head_and_loss": share}
    path = write_json(result_name("trainer", device), found | {"figures": records})
    print_table(found, records)
    print(f"wrote {path}")


def print_table(found: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Milliseconds a step, MiB above the model, and the ratio to ours."""
    ours = records[-1]["seconds"]["median"]
    table = Table(
        "loss", "ms a step", "spread", "x ours", "MiB", "largest batch", title=f"{found['model']}, {found['shape']}"
    )
    for record in records:
        seconds = record["seconds"]
        table.add_row(
            record["way"],
            f"{seconds['median'] * 1e3:.1f}",
            f"{seconds['low'] * 1e3:.1f}-{seconds['high'] * 1e3:.1f}",
            f"{seconds['median'] / ours:.2f}",
            f"{record['peak_bytes'] / 2**20:.0f}",
            str(record.get("largest_batch", "")),
        )
    Console(width=110).print(table)
    print(f"head and loss: {found['share_of_head_and_loss']:.0%} of a step with the fused loss")


if __name__ == "__main__":
    main()
