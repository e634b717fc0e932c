"""Log-likelihoods of responses: the Monte-Carlo bound of LLaDA, and the likelihood along a decoding."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tabom.data.encoding import check_prompt
from tabom.data.trajectories import response_blocks
from tabom.models.diffusion_model import DiffusionModel, logits_at
from tabom.models.layout import response_logits
from tabom.models.nan_checks import logits_not_finite
from tabom.sampling.completions import with_block_length
from tabom.sampling.config import SamplerConfig
from tabom.sampling.policies import (
    Step,
    choose,
    first_sub_block,
    read_candidates,
    steps_that_unmask,
    time_shares,
)
from tabom.sampling.sampler import left_pad
from tabom_kernels import mix_keys


def nelbo_log_likelihood(
    model: DiffusionModel, prompt: Sequence[int], response: Sequence[int], samples: int, seed: int = 0, batch: int = 32
) -> float:
    """An unbiased estimate of a lower bound on the log-likelihood (nats) of a response of L tokens.

    The mean over draws of L/k times the log-probabilities of k random masked tokens, k ~ U{1..L} (LLaDA, arXiv
    2502.09992, Algorithm 3). The k of the draws are spread evenly over 1..L, which lowers the variance.

    With block-causal attention the log-likelihood is the sum over the blocks of log p(block | all text before it), and
    the bound is the sum of the bounds of these (block diffusion, arXiv 2503.09573): each block has a k of its own, over
    its own tokens of the response, behind clean blocks. One forward has all blocks (`tabom.models.layout`). What
    follows the response in its last block is masked, as in decoding.

    Args:
        samples: number of draws, each of which is one row of a forward pass.
        batch: rows of a forward pass.

    Raises:
        ValueError: the prompt is shorter than the model's `logits_shift`.
        FloatingPointError: the logits are not finite; names the cause.
    """
    check_prompt(len(prompt), model.logits_shift)
    rng = np.random.default_rng(seed)
    blocks = response_blocks(len(prompt), len(response), model.block_size)
    draws = [draw_masks(block.stop - block.start, samples, rng) for block in blocks]
    masked, weights = (torch.from_numpy(np.concatenate(arrays, axis=1)) for arrays in zip(*draws, strict=True))
    total = 0.0
    for rows in torch.arange(samples).split(batch):
        log_p = masked_log_probabilities(model, prompt, response, masked[rows])
        total += (log_p * weights[rows]).sum().item()
    if math.isnan(total):
        raise logits_not_finite(model.model)
    return total / samples


def draw_masks(length: int, samples: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Which of `length` tokens each draw masks, bool, and their weights L/k: both (samples, length)."""
    strata = (np.arange(samples) + rng.random()) / samples
    counts = 1 + np.floor(strata * length).astype(int)[:, None]
    ranks = rng.random((samples, length)).argsort(axis=1)
    return ranks < counts, np.broadcast_to(length / counts, ranks.shape)


@torch.inference_mode()
def masked_log_probabilities(
    model: DiffusionModel, prompt: Sequence[int], response: Sequence[int], masked: Tensor
) -> Tensor:
    """(B, T) log-probability (nats) of the true token where `masked` (B, T), 0 elsewhere."""
    logits = response_logits(model, prompt, response, masked, masked)
    target = torch.tensor(response).expand(masked.shape)[masked]
    chosen = logits.float().log_softmax(-1).cpu().gather(1, target[:, None])[:, 0].double()
    return torch.zeros(masked.shape, dtype=torch.float64).masked_scatter(masked, chosen)


@torch.inference_mode()
def trajectory_log_likelihood(
    model: DiffusionModel, prompt: Sequence[int], response: Sequence[int], config: SamplerConfig
) -> tuple[float, bool]:
    """The log-likelihood (nats) of a response in the order in which the sampler unmasks it, and whether it is greedy.

    At every step the policy chooses positions, as in sampling, and the true tokens are put there; the result is the sum
    of their log-probabilities. With one token a step and a deterministic policy it is exact: the likelihoods of all
    responses add up to 1. Tokens of the same step are treated as independent, as the sampler draws them.

    With block-causal attention the blocks are decoded one after the other. What follows the response in its last block
    stays masked.

    Args:
        config: its policy and `tokens_per_step` are used, and with block-causal attention `block_length`; `steps`,
            editing and temperature are ignored, and with full attention so are blocks, so that Dream's time schedule
            runs over as many steps as the response has tokens.

    Returns:
        The log-likelihood, and whether every token is the most probable one at its step.

    Raises:
        ValueError: the prompt is shorter than the model's `logits_shift`, or the policy needs another model.
        FloatingPointError: the logits are not finite; names the cause.
    """
    check_prompt(len(prompt), model.logits_shift)
    model = with_block_length(model, config)
    config = replace(config, steps=None, block_length=None, stop_early=False, temperature=0.0)
    plan = config.plan(len(response), len(prompt), model.block_size)
    target = torch.tensor([response], device=model.device)
    inputs = left_pad(model, [prompt], plan.length)
    tokens = inputs["input_ids"][:, len(prompt) :][:, : len(response)]  # a view: the next forward sees what is put here
    hidden, place = torch.ones_like(tokens, dtype=torch.bool), torch.arange(len(response), device=model.device)
    given, seeds = (torch.tensor([number], device=model.device) for number in (plan.given, config.seed))
    total, is_greedy, taken = 0.0, True, 0
    shares = time_shares(plan.steps, config.eps).tolist()
    for block in response_blocks(len(prompt), len(response), model.block_size):
        in_block, begun = (block.start <= place) & (place < block.stop), taken
        for step in steps_that_unmask(config.policy, plan.steps, plan.size, config.eps):
            masked = first_sub_block(hidden & in_block, given, plan.size, config)
            b, t = masked.nonzero(as_tuple=True)
            if len(t) == 0:
                break
            logits = logits_at(model.model, model.logit_rows(len(prompt) + t), **inputs)
            logits[:, model.mask_token_id] = -torch.inf
            token, candidates = read_candidates(logits, masked, mix_keys(seeds[b], begun + step, t), config)
            chosen = choose(candidates, Step(step, plan.steps, plan.size, shares[step]), config)
            log_p = logits.float().log_softmax(-1).gather(1, target[0, t, None])[:, 0]
            total += log_p[chosen[0, t]].double().sum().item()
            is_greedy &= bool((token == target)[chosen].all())
            tokens.copy_(torch.where(chosen, target, tokens))
            hidden &= ~chosen
            taken = begun + step + 1
    if math.isnan(total):
        raise logits_not_finite(model.model)
    return total, is_greedy
