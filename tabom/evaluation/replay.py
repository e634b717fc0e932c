"""Replays trajectories with a model, to measure how its certainty follows the order of unmasking."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tabom.data.encoding import encode_prompt
from tabom.data.trajectories import Trajectory, own_steps, response_blocks
from tabom.evaluation.metrics import count_pairs_in_order, tds
from tabom.models.diffusion_model import DiffusionModel
from tabom.models.layout import response_logits
from tabom_kernels import softmax_entropy


class Replay(NamedTuple):
    """A response of T tokens before each of the S steps of its decoding, on the model's device.

    With block-causal attention a step sees the masked tokens of its block only, behind the clean blocks before it, and
    the steps of each block count from 0: the sampler never chooses between blocks.
    """

    steps: Tensor  # (T,) int64, -1 = never unmasked
    masked: Tensor  # (S, T) bool: not yet unmasked, and seen by the step
    entropy: Tensor  # (S, T) nats, 0 elsewhere


@torch.inference_mode()
def replay(model: DiffusionModel, trajectory: Trajectory) -> Replay:
    """Computes the entropies of the masked positions before each step of the trajectory, in one forward."""
    prompt, response = encode_prompt(model.tokenizer, trajectory.prompt), trajectory.response_token_ids
    blocks, order = response_blocks(len(prompt), len(response), model.block_size), trajectory.decoding_order
    if model.block_size is not None:
        order = [step for block in blocks for step in own_steps(order[block])]
    steps = torch.tensor(order)
    if steps.max() < 0:  # nothing was ever unmasked
        nothing = torch.zeros(0, len(order), device=model.device)
        return Replay(steps.to(model.device), nothing.bool(), nothing)
    masked = (steps < 0) | (steps >= torch.arange(int(steps.max()) + 1)[:, None])
    entropy = softmax_entropy(response_logits(model, prompt, response, masked, masked))
    steps, masked = steps.to(model.device), masked.to(model.device)
    entropy = entropy.new_zeros(masked.shape).masked_scatter(masked, entropy)

    place, of_steps = torch.arange(len(response), device=model.device), []
    for block in blocks:
        count = int(steps[block].max()) + 1
        seen = masked[:count] & (block.start <= place) & (place < block.stop)
        of_steps.append((seen, entropy[:count].where(seen, 0)))
    return Replay(steps, *map(torch.cat, zip(*of_steps, strict=True)))


def order_accuracy(model: DiffusionModel, trajectories: Sequence[Trajectory]) -> np.ndarray:
    """The share of pairs of masked positions whose earlier one has the lower entropy, for each trajectory.

    The pairs before all steps of a trajectory are counted together. With block-causal attention they are pairs inside a
    block. A trajectory without a pair, whose blocks are decoded in one step each, has NaN.
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
