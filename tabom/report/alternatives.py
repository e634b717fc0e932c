"""The model's probabilities at the step that unmasked each token, by replaying the trajectory."""

from typing import Any

import torch

from tabom.data.encoding import encode_prompt
from tabom.data.trajectories import Trajectory
from tabom.models.diffusion_model import DiffusionModel
from tabom.models.layout import response_logits
from tabom.models.nan_checks import logits_not_finite

STEPS_PER_FORWARD = 32
"""How many steps are replayed in one forward."""

SHOWN_PROBABILITY = 0.0005
"""The least probability of an alternative that is shown; smaller ones would be printed as 0.0 %."""


@torch.inference_mode()
def replay_tokens(model: DiffusionModel, trajectory: Trajectory, count: int = 3) -> dict[str, list[Any]]:
    """Entropy (nats), probability and the best `count` other tokens of every unmasked token: lists over the response.

    A token that was never unmasked has entropy and probability 0 and no alternatives. With block-causal attention a
    token is seen with its block, behind the clean blocks before it.

    Raises:
        FloatingPointError: the logits are not finite; names the cause.
    """
    prompt = encode_prompt(model.tokenizer, trajectory.prompt)
    response = torch.tensor(trajectory.response_token_ids)
    order = torch.tensor(trajectory.decoding_order)
    entropy, probability = torch.zeros(len(order)), torch.zeros(len(order))
    alternatives: list[list] = [[] for _ in order]
    steps = order[order >= 0].unique()
    for moments in steps.split(STEPS_PER_FORWARD) if len(steps) else ():
        masked = (order < 0) | (order >= moments[:, None])
        unmasked = order == moments[:, None]
        position = unmasked.nonzero(as_tuple=True)[1]
        logits = response_logits(model, prompt, trajectory.response_token_ids, masked, unmasked)
        logits[:, model.mask_token_id] = -torch.inf
        log_p = logits.float().log_softmax(-1).cpu()
        chosen = response[position, None]
        entropy[position] = -(log_p.exp() * log_p.clamp(min=-1e9)).sum(-1)
        probability[position] = log_p.gather(1, chosen)[:, 0].exp()
        if not entropy.isfinite().all():
            raise logits_not_finite(model.model)
        best = log_p.scatter(1, chosen, -torch.inf).topk(min(count, log_p.shape[1] - 1))
        others = zip(position.tolist(), best.values.exp().tolist(), best.indices.tolist(), strict=True)
        for place, values, ids in others:
            texts = model.tokenizer.batch_decode([[each] for each in ids])
            pairs = zip(texts, values, strict=True)
            alternatives[place] = [[text, round(p, 4)] for text, p in pairs if p >= SHOWN_PROBABILITY]
    return {
        "entropy": [float(f"{value:.4g}") for value in entropy.tolist()],
        "probability": [round(value, 4) for value in probability.tolist()],
        "alternatives": alternatives,
    }
