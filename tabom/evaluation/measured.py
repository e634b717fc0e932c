"""A batch of answers with what its decoding showed: the order of certainty, TDS, steps and positions computed."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from tabom.evaluation.metrics import count_pairs_in_order, tds
from tabom.models.diffusion_model import DiffusionModel
from tabom.sampling.sampler import Completion, SamplerConfig, completions, denoise, response_length


class Measured(NamedTuple):
    """A completion and its decoding.

    Positions behind the first end token are left out of all but `positions`. With blocks, a step sees the masked
    positions of its block only.
    """

    completion: Completion
    tokens: int
    steps: int  # denoising steps that unmasked something
    positions: int  # that went through the model's body for this response, prompt and padding included
    in_order: int  # pairs seen by a step whose earlier position had the lower entropy
    pairs: int
    tds: float  # nats^2


def sample_measured(
    model: DiffusionModel, prompts: Sequence[Sequence[int]], config: SamplerConfig, seeds: Sequence[int]
) -> list[Measured]:
    """Decodes a batch of prompts and measures each decoding; see `tabom.denoise`."""
    length = response_length(model, config)
    seen = []
    for state in denoise(model, prompts, length, config, seeds):
        seen.append(state.candidate_entropy.cpu())
    entropies = torch.stack(seen[1:], dim=1).double()  # (B, S, T)
    calls = sum(bool(step.isfinite().any()) for step in seen)
    positions = calls * (max(map(len, prompts)) + length)
    return [
        measure(model, completion, entropy, positions)
        for completion, entropy in zip(completions(state), entropies, strict=True)
    ]


def measure(model: DiffusionModel, completion: Completion, entropy: torch.Tensor, positions: int) -> Measured:
    """One decoding of T tokens from the entropies (S, T) that its steps saw, NaN where they had no choice."""
    is_end = np.array(completion.token_ids) == model.eos_token_id
    counts = is_end.cumsum() - is_end == 0  # the first end token counts, what follows it does not
    order = torch.tensor(completion.decoding_order)
    masked = entropy.isfinite() & torch.from_numpy(counts)
    in_order = pairs = 0
    for step in range(int(order.max()) + 1):
        of_step = masked[step]
        rows = torch.tensor([0, int(of_step.sum())])
        found = count_pairs_in_order(entropy[step][of_step], order[of_step], rows)
        in_order, pairs = in_order + int(found.in_order), pairs + int(found.pairs)
    return Measured(
        completion,
        tokens=int((is_end.cumsum() == 0).sum()),
        steps=len(set(completion.decoding_order) - {-1}),
        positions=positions,
        in_order=in_order,
        pairs=pairs,
        tds=tds(entropy.nan_to_num().numpy(), masked.numpy()),
    )
