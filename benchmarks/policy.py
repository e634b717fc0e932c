"""The policy loss, forward and backward from the hidden states with a frozen head: ours beside TRL's and Liger's.

    python -m benchmarks.policy

Clipped surrogate plus KL to a reference, without an entropy bonus, which Liger's loss lacks. All are first checked to
give the same loss and gradient. Liger's loss is timed compiled, as it is by default, and not compiled. Its memory is
not given on a CPU, where PyTorch's profiler counts less for it than the logits of one response take. Writes
benchmarks/results/policy-<device>.json.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from torch import Tensor
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from benchmarks.loss import machine
from benchmarks.tools.measure import (
    Contender,
    environment,
    is_gpu,
    peak_memory_of,
    result_name,
    time_interleaved,
    write_json,
)
from tabom_kernels import fused_linear_logprobs, fused_linear_policy_loss

CLIP, KL_WEIGHT = 0.2, 0.04
VOCABULARY = 151936
COMPILED = "Liger, compiled"
TRL_TILE = 32768
"""Columns of a tile, as TRL's trainers take them."""


class Rollouts(NamedTuple):
    """B responses of T tokens."""

    hidden: Tensor  # (B, T, D), requires a gradient
    weight: Tensor  # (V, D)
    labels: Tensor  # (B, T)
    old_logprobs: Tensor  # (B, T)
    ref_logprobs: Tensor  # (B, T)
    advantages: Tensor  # (B,)


def draw_rollouts(sequences: int, length: int, width: int, columns: int, device: torch.device) -> Rollouts:
    """Random hidden states and head in bf16; ratios lie on both sides of the clip."""
    hidden = torch.randn(sequences, length, width, device=device).bfloat16()
    weight = (torch.randn(columns, width, device=device) * width**-0.5).bfloat16()
    labels = torch.randint(columns, (sequences, length), device=device)
    logprobs = fused_linear_logprobs(hidden.flatten(0, 1), weight, labels.flatten())[0].view_as(labels)
    old, reference = (logprobs + 0.2 * torch.randn_like(logprobs) for _ in range(2))
    advantages = torch.randn(sequences, device=device)
    return Rollouts(hidden.requires_grad_(), weight, labels, old, reference, advantages)


def loss_of_logprobs(rollouts: Rollouts, logprobs: Tensor) -> Tensor:
    """The loss in plain PyTorch, from the log-probabilities (B * T,) of the labels."""
    advantages = rollouts.advantages.repeat_interleave(rollouts.labels.shape[1])
    ratio = (logprobs - rollouts.old_logprobs.flatten()).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    d = rollouts.ref_logprobs.flatten() - logprobs
    return (KL_WEIGHT * (d.exp() - d - 1) - surrogate).mean()


def ours(rollouts: Rollouts) -> Tensor:
    """`fused_linear_policy_loss`."""
    hidden, labels = rollouts.hidden.flatten(0, 1), rollouts.labels
    return fused_linear_policy_loss(
        *(hidden, rollouts.weight, labels.flatten(), rollouts.old_logprobs.flatten()),
        rollouts.advantages.repeat_interleave(labels.shape[1]),
        **{"clip": CLIP, "ref_logprobs": rollouts.ref_logprobs.flatten(), "kl_weight": KL_WEIGHT},
    ).loss


def our_logprobs(rollouts: Rollouts) -> Tensor:
    """`fused_linear_logprobs` with the loss in plain PyTorch."""
    logprobs, _ = fused_linear_logprobs(rollouts.hidden.flatten(0, 1), rollouts.weight, rollouts.labels.flatten())
    return loss_of_logprobs(rollouts, logprobs)


def plain(rollouts: Rollouts) -> Tensor:
    """All logits at once."""
    logits = F.linear(rollouts.hidden.flatten(0, 1), rollouts.weight)
    return loss_of_logprobs(rollouts, -F.cross_entropy(logits.float(), rollouts.labels.flatten(), reduction="none"))


def trl(rollouts: Rollouts) -> Tensor:
    """TRL's log-probabilities in tiles of the vocabulary."""
    hidden, labels = rollouts.hidden.flatten(0, 1), rollouts.labels.flatten()
    logprobs, *_ = ChunkedLogProbFunction.apply(hidden, rollouts.weight, None, labels, 1.0, TRL_TILE, None, 1.0, ())
    return loss_of_logprobs(rollouts, logprobs)


def liger(loss: LigerFusedLinearGRPOLoss, rollouts: Rollouts) -> Tensor:
    """Liger's loss, one response at a time, as it is by default."""
    return loss(
        rollouts.hidden,
        rollouts.weight,
        rollouts.labels,
        torch.ones_like(rollouts.labels),
        rollouts.advantages,
        ref_per_token_logps=rollouts.ref_logprobs,
        old_per_token_logps=rollouts.old_logprobs,
    )[0]


Loss = Callable[[Rollouts], Tensor]


def losses() -> dict[str, Loss]:
    """Every contender by name."""
    compiled, eager = (
        LigerFusedLinearGRPOLoss(beta=KL_WEIGHT, epsilon_low=CLIP, epsilon_high=CLIP, compiled=is_compiled)
        for is_compiled in (True, False)
    )
    return {
        "ours": ours,
        "ours, log-probabilities": our_logprobs,
        "plain PyTorch": plain,
        "TRL": trl,
        COMPILED: lambda rollouts: liger(compiled, rollouts),
        "Liger, not compiled": lambda rollouts: liger(eager, rollouts),
    }


def measure(rollouts: Rollouts, contenders: dict[str, Loss], device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Time and incremental peak memory of every contender.

    Raises:
        AssertionError: a contender computes something else than the first one does.
    """

    def step(loss: Loss) -> Callable[[], list[Tensor]]:
        def loss_and_gradient() -> list[Tensor]:
            value = loss(rollouts)
            return [value.detach(), *torch.autograd.grad(value, rollouts.hidden)]

        return loss_and_gradient

    calls = {name: step(loss) for name, loss in contenders.items()}
    (_, expected), *others = [(name, call()) for name, call in calls.items()]
    for name, results in others:
        for a, b in zip(results, expected, strict=True):
            assert (a.float() - b.float()).norm() <= 2e-2 * b.float().norm(), name
    timings = time_interleaved([Contender(name, [call], False) for name, call in calls.items()], device, rounds)
    rows, columns = rollouts.labels.numel(), rollouts.weight.shape[0]
    return [
        {
            "rows": rows,
            "vocabulary": columns,
            "contender": name,
            "seconds": timings[name, "eager"]._asdict(),
            "peak_bytes": None if name.startswith("Liger") and not is_gpu(device) else peak_memory_of(call, device),
        }
        for name, call in calls.items()
    ]


def times_table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: milliseconds with their spread, and the memory."""
    lines = ["| rows | | ms | MiB |", "| ---: | --- | ---: | ---: |"]
    for record in records:
        median, low, high = (1e3 * record["seconds"][name] for name in ("median", "low", "high"))
        time = f"{median:.0f} ({low:.0f} to {high:.0f})"
        memory = "not counted" if record["peak_bytes"] is None else f"{record['peak_bytes'] / 2**20:.0f}"
        lines.append(f"| {record['rows']} | {record['contender']} | {time} | {memory} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sequences", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--length", type=int, default=64)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    device, _, rounds, (*_, width) = machine()
    records = []
    for sequences in options.sequences:
        torch.compiler.reset()
        rollouts = draw_rollouts(sequences, options.length, width, VOCABULARY, device)
        records += measure(rollouts, losses(), device, rounds)
    print(times_table(records))
    print(f"wrote {write_json(result_name('policy', device), environment(device) | {'figures': records})}")


if __name__ == "__main__":
    main()
