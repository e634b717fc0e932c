"""Row losses: functions of the cross-entropy and the entropy of each row, with both gradients in closed form.

Every loss of this package has one shape. The statistics of each row of logits go into a row loss, which returns the
loss and its gradients by the statistics, dL/dce and dL/dE; these two numbers a row are all that the gradient of the
logits needs. A row loss may couple the rows of one sequence, as a ranking does. A policy loss is a row loss as well,
because the log-probability of a token is -ce.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tabom_kernels.arguments import (
    FORMS,
    NOT_NEGATIVE,
    check_form,
    check_labels,
    check_scalar,
    check_sequences,
    check_weights,
)
from tabom_kernels.backends.reference import working_dtype
from tabom_kernels.ops.chunks import Chunk, take_rows
from tabom_kernels.ops.derivatives import call_directly
from tabom_kernels.ops.ranking import as_settings, count_op

IGNORE_INDEX = -100
"""Label of a row without a cross-entropy, inside the ops."""


class RowGradients(NamedTuple):
    """What a row loss returns for the n rows of a chunk; the results of all chunks add up.

    The loss is the sum of its `terms` (k,), which are logged one by one. `cross_entropy` and `entropy` (None for zeros)
    are the gradients (n,) of the loss by the statistics, and `temperature` () is its gradient by the temperature (None
    without one).
    """

    terms: Tensor
    cross_entropy: Tensor
    entropy: Tensor | None
    temperature: Tensor | None


class RowLoss(Protocol):
    """A loss of the rows' statistics.

    `cu_seqlens` holds the offsets of the sequences whose rows must be evaluated together, or None if every row stands
    alone. `number_of_terms` is that of the loss's terms.
    """

    cu_seqlens: Tensor | None
    number_of_terms: int

    def __call__(self, chunk: Chunk, cross_entropy: Tensor, entropy: Tensor) -> RowGradients:
        """The loss of the rows of a chunk and its gradients, from their statistics (n,) in nats."""
        ...


class Ranking(NamedTuple):
    """sum(weights * trajectory_rank_loss(E)), the part of a row loss that ranks entropies.

    Args:
        form, temperature, steps, cu_seqlens, margin: of the rank loss; the temperature is a number or ().
        backend: the module of a backend, see `backends.selection.load`.
        weights: (B,) weight of each sequence's rank loss, divided by the number of sequences.
    """

    form: str
    backend: ModuleType
    temperature: float | Tensor
    weights: Tensor
    steps: Tensor
    cu_seqlens: Tensor
    margin: float | Tensor

    def __call__(self, chunk: Chunk, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The term (1,) of a chunk, and its gradients by the entropy (n,) and by the temperature ()."""
        first, stop = chunk.sequences.start, chunk.sequences.stop
        offsets = take_rows(self.cu_seqlens, slice(first, stop + 1))
        weights, steps = take_rows(self.weights, chunk.sequences), take_rows(self.steps, chunk.rows)
        if chunk.rows.start > 0:
            offsets = offsets - chunk.rows.start
        rank = self.backend.trajectory_rank_loss(entropy, steps, offsets, self.form, self.margin, self.temperature)
        row_weights = weights.repeat_interleave(offsets.diff(), output_size=entropy.shape[0])
        rank_sum = (weights * rank.loss).sum(0, keepdim=True)
        return rank_sum, rank.grad_entropy * row_weights, (weights * rank.grad_temperature).sum()


class TabomRowLoss:
    """sum(ce_weights * ce) plus a ranking; the terms are these two, or the first alone without a ranking.

    Args:
        form, backend, temperature: see `Ranking`.
        ce_weights: (N,) weight of each row's cross-entropy, divided by the number of tokens, 0 for an ignored row.
        ranking: the tensors of a `Ranking`, none without one.
    """

    def __init__(
        self, form: str, backend: ModuleType, temperature: float | Tensor, ce_weights: Tensor, *ranking: Any
    ) -> None:
        self.ce_weights = ce_weights
        self.ranking = Ranking(form, backend, temperature, *ranking) if ranking else None
        self.cu_seqlens = self.ranking.cu_seqlens if ranking else None
        self.number_of_terms = 2 if ranking else 1

    def __call__(self, chunk: Chunk, cross_entropy: Tensor, entropy: Tensor) -> RowGradients:
        """See `RowLoss`."""
        ce_weights = take_rows(self.ce_weights, chunk.rows)
        ce_sum = (ce_weights * cross_entropy).sum(0, keepdim=True)
        if self.ranking is None:
            return RowGradients(ce_sum, ce_weights, None, None)
        rank_sum, by_entropy, by_temperature = self.ranking(chunk, entropy)
        return RowGradients(torch.cat([ce_sum, rank_sum]), ce_weights, by_entropy, by_temperature)


MAX_LOG_RATIO = 80.0
"""Bounds the logarithm of a ratio of probabilities, so that the ratio is finite in fp32 and 0 times it is 0."""


class PolicyRowLoss:
    """Clipped policy loss, KL to a reference and entropy bonus, plus a ranking; the terms are these three or four.

    With log p = -ce, r = exp(log p - old) and d = ref - log p, the terms are the sums of

        -weights * min(r * A, clamp(r, lowest, highest) * A)        (PPO, arXiv 1707.06347, Eq. 7)
        kl_weights * (exp(d) - d - 1)                               (the estimator of GRPO, arXiv 2402.03300, Eq. 4)
        -entropy_weights * E

    Args:
        form, backend, temperature: see `Ranking`.
        weights: (N,) weight of each row, divided by the number of tokens, 0 for an ignored row.
        old_logprobs, advantages: (N,) the log-probabilities of the policy that acted, or (0,) if it is this one, and A.
        lowest, highest: of the ratio.
        ref_logprobs, kl_weights: (N,), or (0,) without a KL.
        entropy_weights: (N,), or (0,) without a bonus.
        ranking: the tensors of a `Ranking`, none without one.
    """

    def __init__(
        self,
        form: str,
        backend: ModuleType,
        temperature: float | Tensor,
        weights: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        lowest: float | Tensor,
        highest: float | Tensor,
        ref_logprobs: Tensor,
        kl_weights: Tensor,
        entropy_weights: Tensor,
        *ranking: Any,
    ) -> None:
        self.weights, self.old_logprobs, self.advantages = weights, old_logprobs, advantages
        self.lowest, self.highest = lowest, highest
        self.ref_logprobs, self.kl_weights, self.entropy_weights = ref_logprobs, kl_weights, entropy_weights
        optional = (old_logprobs, kl_weights, entropy_weights)
        self.has_old, self.has_kl, self.has_bonus = (x.shape[0] == weights.shape[0] for x in optional)
        self.ranking = Ranking(form, backend, temperature, *ranking) if ranking else None
        self.cu_seqlens = self.ranking.cu_seqlens if ranking else None
        self.number_of_terms = 4 if ranking else 3

    def __call__(self, chunk: Chunk, cross_entropy: Tensor, entropy: Tensor) -> RowGradients:
        """See `RowLoss`."""
        weights, advantages = take_rows(self.weights, chunk.rows), take_rows(self.advantages, chunk.rows)
        old_logprobs = take_rows(self.old_logprobs, chunk.rows) if self.has_old else -cross_entropy
        log_ratio = -cross_entropy - old_logprobs
        ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
        gain, clipped_gain = ratio * advantages, ratio.clamp(self.lowest, self.highest) * advantages
        terms = [-(weights * torch.minimum(gain, clipped_gain)).sum()]
        is_active = (gain <= clipped_gain) & (log_ratio <= MAX_LOG_RATIO)
        by_ce, by_entropy, by_temperature = weights * gain.where(is_active, 0.0), None, None
        if self.has_kl:
            kl_weights = take_rows(self.kl_weights, chunk.rows)
            log_ratio = take_rows(self.ref_logprobs, chunk.rows) + cross_entropy
            d = log_ratio.clamp(max=MAX_LOG_RATIO)
            relative = d.expm1()
            terms.append((kl_weights * (relative - d)).sum())
            by_ce = by_ce + kl_weights * relative.where(log_ratio <= MAX_LOG_RATIO, 0.0)
        else:
            terms.append(torch.zeros_like(terms[0]))
        if self.has_bonus:
            by_entropy = -take_rows(self.entropy_weights, chunk.rows)
            terms.append((by_entropy * entropy).sum())
        else:
            terms.append(torch.zeros_like(terms[0]))
        terms = torch.stack(terms)
        if self.ranking is not None:
            rank_sum, by_rank, by_temperature = self.ranking(chunk, entropy)
            terms = torch.cat([terms, rank_sum])
            by_entropy = by_rank if by_entropy is None else by_entropy + by_rank
        return RowGradients(terms, by_ce, by_entropy, by_temperature)


ROW_LOSSES: dict[str, Callable[..., RowLoss]] = {
    f"{name}_{form}": partial(row_loss, form)
    for name, row_loss in (("tabom", TabomRowLoss), ("policy", PolicyRowLoss))
    for form in FORMS
}
"""Row losses by name, called with a backend, a temperature and tensors: an op cannot be given an object."""


class TabomArguments(NamedTuple):
    """The arguments that `tabom_loss` and `fused_linear_tabom_loss` share; `tabom_loss` documents them."""

    labels: Tensor
    steps: Tensor | None
    cu_seqlens: Tensor | None
    rank_weight: float
    form: str
    margin: float
    temperature: float | Tensor
    token_weights: Tensor | None
    num_tokens: float | Tensor | None
    num_sequences: float | Tensor | None
    ignore_index: int
    sequence_weights: Tensor | None = None

    def check(self, rows: int, columns: int, device: torch.device) -> None:
        """Checks the arguments of the loss of (N, V) logits on `device`."""
        check_labels(self.labels, rows, columns, device, self.ignore_index)
        if self.rank_weight != 0 or self.steps is not None or self.cu_seqlens is not None:
            check_sequences(self.steps, self.cu_seqlens, rows, device)
        check_form(self.form, self.margin, self.temperature)
        check_scalar("rank_weight", self.rank_weight, *NOT_NEGATIVE)
        for name, count in (("num_tokens", self.num_tokens), ("num_sequences", self.num_sequences)):
            if count is not None:
                check_scalar(name, count, *NOT_NEGATIVE)
        check_weights("token_weights", self.token_weights, rows, device)
        if self.sequence_weights is not None:
            if self.cu_seqlens is None:
                raise ValueError("sequence_weights: expected None, as cu_seqlens is None")
            check_weights("sequence_weights", self.sequence_weights, self.cu_seqlens.shape[0] - 1, device)

    def token_shares(self, dtype: torch.dtype) -> Tensor:
        """(N,) the token weights divided by the number of tokens; 0 for an ignored row, whatever its weight is."""
        is_used = self.labels != self.ignore_index
        tokens = is_used.sum().clamp(min=1) if self.num_tokens is None else nonzero(self.num_tokens)
        weights = is_used if self.token_weights is None else self.token_weights.where(is_used, 0.0)
        return weights.to(dtype) / tokens


def row_loss_inputs(
    arguments: TabomArguments, like: Tensor, backend: str
) -> tuple[Tensor, float | Tensor, list[Tensor]]:
    """The labels with IGNORE_INDEX, and the temperature and the tensors that make a `TabomRowLoss`.

    Weights are divided by their denominators here, in the working dtype of `like`.
    """
    labels, dtype = arguments.labels, working_dtype(like.dtype)
    temperature, margin, rank_weight = as_settings(like, arguments.temperature, arguments.margin, arguments.rank_weight)
    tensors = [arguments.token_shares(dtype)]
    if arguments.ignore_index != IGNORE_INDEX:
        labels = labels.where(labels != arguments.ignore_index, IGNORE_INDEX)
    if arguments.rank_weight != 0:
        steps, cu_seqlens = arguments.steps, arguments.cu_seqlens
        if arguments.num_sequences is None:
            sequences = (call_directly(count_op, steps, cu_seqlens, backend) > 0).sum().clamp(min=1)
        else:
            sequences = nonzero(arguments.num_sequences)
        if not isinstance(rank_weight, Tensor):  # filled on the device, because a copy would wait for it
            rank_weight = torch.full((), rank_weight, dtype=dtype, device=like.device)
        rank_weights = (rank_weight / sequences).expand(cu_seqlens.shape[0] - 1)
        if arguments.sequence_weights is not None:
            rank_weights = rank_weights * arguments.sequence_weights.to(dtype)
        tensors += [rank_weights, steps, cu_seqlens, margin]
    return labels, temperature, tensors


def nonzero(count: float | Tensor) -> float | Tensor:
    """The denominator itself, or 1 where it is 0, as the sum that it divides is then 0."""
    return count.masked_fill(count == 0, 1) if isinstance(count, Tensor) else count or 1
