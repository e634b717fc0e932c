"""Log-likelihoods of responses: the Monte-Carlo bound of LLaDA, and the likelihood along a decoding."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tabom.data.encoding import check_prompt
from tabom.models.diffusion_model import DiffusionModel, logits_at
from tabom.models.nan_checks import logits_not_finite
from tabom.sampling.config import SamplerConfig
from tabom.sampling.policies import Step, choose, read_candidates, steps_that_unmask, time_shares
from tabom.sampling.sampler import left_pad
from tabom_kernels import mix_keys


def nelbo_log_likelihood(
    model: DiffusionModel, prompt: Sequence[int], response: Sequence[int], samples: int, seed: int = 0, batch: int = 32
) -> float:
    """An unbiased estimate of a lower bound on the log-likelihood (nats) of a response of L tokens.

    The mean over draws of L/k times the log-probabilities of k random masked tokens, k ~ U{1..L} (LLaDA, arXiv
    2502.09992, Algorithm 3). The k of the draws are spread evenly over 1..L, which lowers the variance.

    Args:
        samples: number of draws, each of which is one row of a forward pass.
        batch: rows of a forward pass.

    Raises:
        ValueError: the prompt is shorter than the model's `logits_shift`, or the model attends block-causally.
        FloatingPointError: the logits are not finite; names the cause.
    """
    check_prompt(len(prompt), model.logits_shift)
    check_full_attention(model)
    rng = np.random.default_rng(seed)
    length = len(response)
    strata = (np.arange(samples) + rng.random()) / samples
    counts = 1 + np.floor(strata * length).astype(int)
    ranks = rng.random((samples, length)).argsort(axis=1)
    masked = torch.from_numpy(ranks < counts[:, None])
    weights = torch.from_numpy(length / counts)
    target = torch.tensor(response)
    total = 0.0
    for rows in torch.arange(samples).split(batch):
        log_p = masked_log_probabilities(model, prompt, target, masked[rows])
        total += (log_p.sum(1) * weights[rows]).sum().item()
    if math.isnan(total):
        raise logits_not_finite(model.model)
    return total / samples


@torch.inference_mode()
def masked_log_probabilities(model: DiffusionModel, prompt: Sequence[int], target: Tensor, masked: Tensor) -> Tensor:
    """(B, L) log-probability (nats) of the true token where `masked` (B, L), 0 elsewhere."""
    shown = target.where(~masked, model.mask_token_id)
    input_ids = torch.cat([torch.tensor(prompt, dtype=torch.long).expand(len(masked), -1), shown], dim=1)
    b, t = masked.nonzero(as_tuple=True)
    rows = model.logit_rows(b * input_ids.shape[1] + len(prompt) + t)
    logits = logits_at(model.model, rows.to(model.device), **model.inputs(input_ids))
    chosen = logits.float().log_softmax(-1).cpu().gather(1, target[t, None])[:, 0].double()
    return torch.zeros(masked.shape, dtype=torch.float64).masked_scatter(masked, chosen)


@torch.inference_mode()
def trajectory_log_likelihood(
    model: DiffusionModel, prompt: Sequence[int], response: Sequence[int], config: SamplerConfig
) -> tuple[float, bool]:
    """The log-likelihood (nats) of a response in the order in which the sampler unmasks it, and whether it is greedy.

    At every step the policy chooses positions, as in sampling, and the true tokens are put there; the result is the sum
    of their log-probabilities. With one token a step and a deterministic policy it is exact: the likelihoods of all
    responses add up to 1. Tokens of the same step are treated as independent, as the sampler draws them.

    Args:
        config: its policy and `tokens_per_step` are used; blocks, `steps` and temperature are ignored, so that Dream's
            time schedule runs over as many steps as the response has tokens.

    Returns:
        The log-likelihood, and whether every token is the most probable one at its step.

    Raises:
        ValueError: the prompt is shorter than the model's `logits_shift`, or the model attends block-causally.
        FloatingPointError: the logits are not finite; names the cause.
    """
    check_prompt(len(prompt), model.logits_shift)
    check_full_attention(model)
    config = replace(config, steps=None, block_length=None, stop_early=False, temperature=0.0)
    length = len(response)
    target = torch.tensor([response], device=model.device)
    inputs = left_pad(model, [prompt], length)
    positions = inputs["input_ids"].shape[1]
    tokens = inputs["input_ids"][:, -length:]  # a view, so that the next forward sees the tokens put here
    hidden = torch.ones_like(tokens, dtype=torch.bool)
    seeds = torch.tensor([config.seed], device=model.device)
    total, is_greedy = 0.0, True
    steps = config.plan(length).steps
    shares = time_shares(steps, config.eps).tolist()
    for step in steps_that_unmask(config.policy, steps, length, config.eps):
        b, t = hidden.nonzero(as_tuple=True)
        if len(t) == 0:
            break
        rows = model.logit_rows(positions - length + t)
        logits = logits_at(model.model, rows, **inputs)
        logits[:, model.mask_token_id] = -torch.inf
        token, candidates = read_candidates(logits, hidden, mix_keys(seeds[b], step, t), config)
        chosen = choose(candidates, Step(step, steps, length, shares[step]), config)
        log_p = logits.float().log_softmax(-1).gather(1, target[0, t, None])[:, 0]
        total += log_p[chosen[0, t]].double().sum().item()
        is_greedy &= bool((token == target)[chosen].all())
        tokens.copy_(torch.where(chosen, target, tokens))
        hidden &= ~chosen
    if math.isnan(total):
        raise logits_not_finite(model.model)
    return total, is_greedy


def check_full_attention(model: DiffusionModel) -> None:
    """Raises a ValueError for block-causal attention, whose likelihoods are those of one block after the other."""
    if model.block_size is not None:
        raise ValueError(
            f"block_size={model.block_size}: likelihoods are computed with full attention only; use generation tasks"
        )
