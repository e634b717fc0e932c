"""Trajectories replayed by a model: whether it is certain in the order in which their tokens were unmasked."""

from collections.abc import Sequence

import numpy as np
import torch

from tabom.data.encoding import encode_prompt
from tabom.data.trajectories import Trajectory
from tabom.evaluation.metrics import count_pairs_in_order
from tabom.models.diffusion_model import DiffusionModel, logits_at
from tabom_kernels import softmax_entropy


@torch.inference_mode()
def order_accuracy(model: DiffusionModel, trajectories: Sequence[Trajectory]) -> np.ndarray:
    """Share of the pairs still to be unmasked whose earlier position has the lower entropy, one score a trajectory.

    Each trajectory is replayed at every step that leaves a pair, and the pairs of all its steps are counted together.
    """
    scores = []
    for trajectory in trajectories:
        prompt = torch.tensor(encode_prompt(model.tokenizer, trajectory.prompt))
        response = torch.tensor(trajectory.response_token_ids)
        steps = torch.tensor(trajectory.decoding_order)
        now = torch.arange(int(steps.max()))[:, None]  # one row a moment of the decoding
        masked = (steps < 0) | (steps >= now)
        ranked = masked & (steps >= 0)
        responses = response.where(~masked, model.mask_token_id)
        input_ids = torch.cat([prompt.expand(len(now), -1), responses], dim=1)
        moment, position = ranked.nonzero(as_tuple=True)
        rows = moment * input_ids.shape[1] + len(prompt) + position - model.logits_shift
        cu_seqlens = torch.nn.functional.pad(ranked.sum(1).cumsum(0), (1, 0)).int()
        input_ids, rows, cu_seqlens, steps = (
            tensor.to(model.device) for tensor in (input_ids, rows, cu_seqlens, steps[position])
        )
        logits = logits_at(model.model, rows, input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
        counts = count_pairs_in_order(softmax_entropy(logits), steps, cu_seqlens)
        scores.append((counts.in_order / counts.pairs).item())
    return np.array(scores)
