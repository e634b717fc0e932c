"""What the policy objective reads from a table of responses: advantages inside groups, and how they were sampled."""

import logging

import datasets
import numpy as np

from tabom.training.settings import ScaleRewards

logger = logging.getLogger(__name__)


def group_advantages(rewards: np.ndarray, groups: np.ndarray, scale_rewards: ScaleRewards) -> np.ndarray:
    """(n,) the reward of each response minus the mean reward of its group, and divided by its standard deviation.

    With `scale_rewards="group"` it is A_i = (r_i - mean) / std (GRPO, arXiv 2402.03300, section 4.1.2), the deviation
    with n - 1 in the denominator. With "none" it is A_i = r_i - mean: the division gives more weight to the prompts
    that are almost always or almost never answered rightly (Dr. GRPO, arXiv 2503.20783). In a group of equal rewards,
    or of one response, it is 0.

    Args:
        rewards: (n,) floating point.
        groups: (n,) names of the groups.
    """
    _, group = np.unique(groups, return_inverse=True)
    counts = np.bincount(group)
    advantages = rewards - (np.bincount(group, rewards) / counts)[group]
    if scale_rewards == "group":
        deviation = np.sqrt(np.bincount(group, advantages**2) / np.maximum(counts - 1, 1))
        advantages = advantages / np.where(deviation > 0, deviation, 1)[group]
    return advantages


def with_rewards(table: datasets.Dataset) -> datasets.Dataset:
    """The rows that have a reward; says how many have none, as responses that no verifier could check.

    Raises:
        ValueError: no row has one.
    """
    kept = np.flatnonzero(~np.isnan(np.array(table["reward"], dtype=float)))  # None becomes NaN
    if not len(kept):
        raise ValueError(
            "objective='policy': none of the records has a reward (field `reward`, or a verdict `correct` of true or "
            "false); collect them with a verifier"
        )
    if len(kept) < len(table):
        logger.warning("%d of %d records have no reward and are left out", len(table) - len(kept), len(table))
    return table.select(kept)


def sampling_temperature(table: datasets.Dataset, needs_logprobs: bool) -> float:
    """The temperature at which all responses of a table were sampled.

    Args:
        needs_logprobs: whether every record must have its log-probabilities.

    Raises:
        ValueError: a record has no temperature, they have several, or one has no log-probabilities.
    """
    temperatures = set(table["temperature"])
    if None in temperatures or 0 in temperatures:
        raise ValueError(
            "objective='policy': a record has no `temperature` above 0; collect the responses with --temperature"
        )
    if len(temperatures) > 1:
        listed = ", ".join(map(str, sorted(temperatures)))
        raise ValueError(f"objective='policy': the records have temperatures {listed}; expected one, as the loss has")
    if needs_logprobs and any(logprob is None for logprob in table["logprob"]):
        raise ValueError(
            "objective='policy' with supervised_window=1: a record has no `logprob`; collect the responses anew, or "
            "give another supervised_window"
        )
    return temperatures.pop()
