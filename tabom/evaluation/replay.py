"""Replays trajectories with a model, to measure how its certainty follows the order of unmasking."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tabom.data.encoding import encode_prompt
from tabom.data.trajectories import Trajectory
from tabom.evaluation.metrics import count_pairs_in_order, tds
from tabom.models.diffusion_model import DiffusionModel, logits_at
from tabom_kernels import softmax_entropy


class Replay(NamedTuple):
    """A response of T tokens before each of the S steps of its decoding, on the model's device."""

    steps: Tensor  # (T,) int64, -1 = never unmasked
    masked: Tensor  # (S, T) bool: not yet unmasked
    entropy: Tensor  # (S, T) nats, 0 where unmasked


@torch.inference_mode()
def replay(model: DiffusionModel, trajectory: Trajectory) -> Replay:
    """Computes the entropies of the masked positions before each step of the trajectory, in one forward.

    With block-causal attention a step sees only the masked positions of its block.
    """
    prompt = torch.tensor(encode_prompt(model.tokenizer, trajectory.prompt))
    response = torch.tensor(trajectory.response_token_ids)
    steps = torch.tensor(trajectory.decoding_order)
    moments = torch.arange(int(steps.max()) + 1)[:, None]
    masked = (steps < 0) | (steps >= moments)
    input_ids = torch.cat([prompt.expand(len(moments), -1), response.where(~masked, model.mask_token_id)], dim=1)
    if model.block_size is not None:
        rest = (0, -input_ids.shape[1] % model.block_size)  # the masks at the end of the last block
        input_ids = torch.nn.functional.pad(input_ids, rest, value=model.mask_token_id)
        block = torch.arange(len(prompt), len(prompt) + len(response)) // model.block_size
        active = block.where(steps >= moments, block[-1]).amin(dim=1, keepdim=True)
        masked &= block == active
    moment, position = masked.nonzero(as_tuple=True)
    rows = model.logit_rows(moment * input_ids.shape[1] + len(prompt) + position)
    steps, masked, rows = (each.to(model.device) for each in (steps, masked, rows))
    logits = logits_at(model.model, rows, **model.inputs(input_ids))
    entropy = softmax_entropy(logits)
    return Replay(steps, masked, entropy.new_zeros(masked.shape).masked_scatter(masked, entropy))


def order_accuracy(model: DiffusionModel, trajectories: Sequence[Trajectory]) -> np.ndarray:
    """The share of pairs of masked positions whose earlier one has the lower entropy, for each trajectory.

    The pairs before all steps of a trajectory are counted together.
    """
    scores = []
    for trajectory in trajectories:
        steps, masked, entropy = replay(model, trajectory)
        rows = masked.sum(1)
        cu_seqlens = torch.nn.functional.pad(rows.cumsum(0), (1, 0)).int()
        counts = count_pairs_in_order(entropy[masked], steps.expand(len(rows), -1)[masked], cu_seqlens)
        scores.append((counts.in_order / counts.pairs).item())
    return np.array(scores)


def replayed_tds(model: DiffusionModel, trajectories: Sequence[Trajectory]) -> np.ndarray:
    """TDS (nats^2, see `tabom.evaluation.metrics.tds`) of each trajectory; the paper uses the model's own responses."""
    scores = []
    for trajectory in trajectories:
        _, masked, entropy = replay(model, trajectory)
        is_end = np.array(trajectory.response_token_ids) == model.eos_token_id
        after_end = is_end.cumsum() - is_end > 0
        scores.append(tds(entropy.double().cpu().numpy(), masked.cpu().numpy() & ~after_end))
    return np.array(scores)
