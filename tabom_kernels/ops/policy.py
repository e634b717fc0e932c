"""The policy loss of a linear head from hidden states, without ever holding the logits of all rows."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tabom_kernels.arguments import NOT_NEGATIVE, check_lengths, check_scalar, check_weights
from tabom_kernels.backends import reference
from tabom_kernels.backends.selection import Backend, resolve
from tabom_kernels.ops.derivatives import refuse_forward_mode
from tabom_kernels.ops.fused_linear import LinearHead
from tabom_kernels.ops.ranking import Form, as_settings
from tabom_kernels.ops.row_loss import MAX_LOG_RATIO, TabomArguments, row_loss_inputs
from tabom_kernels.ops.tabom import rank_term


class PolicyLoss(NamedTuple):
    """The loss, and what it is made of, detached.

    `loss`, `policy`, `kl` and `rank` are scalars; the last two are 0 where their weight is. `logprobs` and `entropy`
    are those of the rows, (N,) nats; the log-probability is 0 where the label is ignored. The ratio of a row with a
    label is exp(logprobs - old_logprobs).
    """

    loss: Tensor
    policy: Tensor
    kl: Tensor
    rank: Tensor
    logprobs: Tensor
    entropy: Tensor


def fused_linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    clip: float | Sequence[float] = 0.2,
    ref_logprobs: Tensor | None = None,
    kl_weight: float = 0.0,
    entropy_weight: float = 0.0,
    steps: Tensor | None = None,
    rank_weight: float = 0.0,
    form: Form = "logistic",
    margin: float = 0.0,
    temperature: float | Tensor = 1.0,
    token_weights: Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    num_sequences: float | Tensor | None = None,
    sequence_weights: Tensor | None = None,
    ignore_index: int = -100,
    bias: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    tp_group: dist.ProcessGroup | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    max_chunk_rows: int | None = None,
    fp32_logits: bool = False,
    backend: Backend | None = None,
) -> PolicyLoss:
    """The clipped policy loss of the tokens `labels`, with a KL to a reference, an entropy bonus and a ranking.

    With log p of the label, the ratio r = exp(log p - old_logprobs), the advantage A, d = ref_logprobs - log p and the
    entropy E of a row, the loss is the sum over the rows, each times token_weights / num_tokens, of

        -min(r A, clamp(r, 1 - clip, 1 + clip) A) + kl_weight (exp(d) - d - 1) - entropy_weight E

    (PPO, arXiv 1707.06347, Eq. 7, with the KL estimator of GRPO, arXiv 2402.03300, Eq. 4), plus `rank_weight` times the
    rank loss of `tabom_loss`. Loss and gradients are computed together, a chunk of rows at a time: 4 N V D FLOP with a
    frozen head, 6 N V D with a trained one. Backward scales the gradients by the upstream gradient. r and exp(d) are
    bounded by exp(80), which fp32 can hold, and have no gradient beyond it.

    Args:
        hidden: (N, D) hidden states of the rows, fp32, fp64 or half precision.
        weight: (V, D) of the head, in the dtype of `hidden`.
        labels: (N,) int64, the tokens that were chosen; `ignore_index` = a row without a policy loss, KL and bonus.
        old_logprobs: (N,) nats, floating point, of the labels under the policy that chose them; None if that is this
            policy, whose ratios are 1.
        advantages: (N,) floating point.
        cu_seqlens, steps: see `tabom_loss`; needed for a ranking only.
        clip: how far the ratio may be from 1, or the distances below and above 1 (DAPO, arXiv 2503.14476); inf does not
            clip.
        ref_logprobs: (N,) nats, floating point, of the labels under the reference.
        kl_weight, entropy_weight: 0 switches the term off.
        rank_weight, form, margin, temperature, num_sequences, sequence_weights: see `tabom_loss`.
        token_weights: (N,) floating point, scales each row (1 / tokens of its response in GRPO); default: 1.
        num_tokens: what the sum over the rows is divided by; default: the rows with a label.
        logit_scale, softcap: as in `fused_linear_tabom_loss`. To make log p that of the distribution at the temperature
            of the sampler, divide both by the temperature.
        bias, lengths, tp_group, max_chunk_rows, fp32_logits, backend: see `fused_linear_tabom_loss`.

    Returns:
        A `PolicyLoss` in fp32 (fp64 for fp64).

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, device or value is wrong, `kl_weight` and `ref_logprobs` are not given together, or the
            backend does not exist.
    """
    head = LinearHead.of(hidden, weight, bias, tp_group, logit_scale, softcap, max_chunk_rows, fp32_logits)
    ranking = (rank_weight, form, margin, temperature)
    arguments = TabomArguments(
        labels, steps, cu_seqlens, *ranking, token_weights, num_tokens, num_sequences, ignore_index, sequence_weights
    )
    hidden = head.hidden
    arguments.check(*head.shape, hidden.device)
    if lengths is not None:
        check_lengths(lengths, cu_seqlens, head.shape[0])
    if advantages is None:
        raise TypeError("advantages: expected a tensor of floating point, got None")
    for name, rows in (("old_logprobs", old_logprobs), ("advantages", advantages), ("ref_logprobs", ref_logprobs)):
        check_weights(name, rows, head.shape[0], hidden.device)
    below, above = distances_of(clip)
    for name, value in (("kl_weight", kl_weight), ("entropy_weight", entropy_weight)):
        check_scalar(name, value, *NOT_NEGATIVE)
    if (kl_weight == 0) != (ref_logprobs is None):
        raise ValueError(
            f"kl_weight={kl_weight} {'without' if ref_logprobs is None else 'with'} ref_logprobs: give both or neither"
        )
    backend = resolve(backend, hidden)
    refuse_forward_mode(backend, hidden, head.weight, head.bias, temperature)
    is_used, dtype = labels != ignore_index, reference.working_dtype(hidden.dtype)
    old_logprobs, advantages, ref_logprobs = (
        None if rows is None else rows.to(dtype).where(is_used, 0.0)
        for rows in (old_logprobs, advantages, ref_logprobs)
    )
    policy = (old_logprobs, advantages, 1 - below, 1 + above, ref_logprobs, kl_weight, entropy_weight)
    if backend == "reference":
        return reference_policy_loss(head.reference_logits(), arguments, *policy)
    lowest, highest = as_settings(hidden, 1 - below, 1 + above)
    labels, temperature, (weights, *rank_tensors) = row_loss_inputs(arguments, hidden, backend)
    nothing = weights.new_empty(0)
    row_tensors = [
        *(weights, nothing if old_logprobs is None else old_logprobs, advantages, lowest, highest),
        *((nothing, nothing) if ref_logprobs is None else (ref_logprobs, weights * kl_weight)),
        nothing if entropy_weight == 0 else weights * entropy_weight,
        *rank_tensors,
    ]
    loss, terms, cross_entropy, entropy = head.loss(
        f"policy_{form}", temperature, labels, row_tensors, lengths, backend
    )
    kl = terms[1] / kl_weight if kl_weight else torch.zeros_like(loss)
    rank = terms[3] / rank_weight if rank_weight else torch.zeros_like(loss)
    return PolicyLoss(loss, terms[0], kl.detach(), rank.detach(), -cross_entropy, entropy)


def distances_of(clip: float | Sequence[float]) -> tuple[float, float]:
    """How far a ratio may be below and above 1."""
    distances = [clip, clip] if isinstance(clip, int | float) else clip
    is_pair = isinstance(distances, Sequence) and len(distances) == 2
    if not is_pair or not all(isinstance(x, int | float) and x >= 0 for x in distances):
        raise ValueError(f"clip={clip!r}: expected a number of at least 0, or two of them")
    return distances[0], distances[1]


def reference_policy_loss(
    logits: Tensor,
    arguments: TabomArguments,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    lowest: float,
    highest: float,
    ref_logprobs: Tensor | None,
    kl_weight: float,
    entropy_weight: float,
) -> PolicyLoss:
    """The loss of the same arguments in naive PyTorch, under autograd."""
    ce, entropy = reference.cross_entropy_with_entropy(logits, arguments.labels, arguments.ignore_index)
    weights = arguments.token_shares(ce.dtype)
    old_logprobs = -ce.detach() if old_logprobs is None else old_logprobs
    ratio = (-ce - old_logprobs).clamp(max=MAX_LOG_RATIO).exp()
    policy = -(weights * torch.minimum(ratio * advantages, ratio.clamp(lowest, highest) * advantages)).sum()
    kl = torch.zeros_like(policy)
    if ref_logprobs is not None:
        d = (ref_logprobs + ce).clamp(max=MAX_LOG_RATIO)
        kl = (weights * (d.expm1() - d)).sum()
    rank = rank_term(arguments, entropy)
    loss = policy + kl_weight * kl - entropy_weight * (weights * entropy).sum() + arguments.rank_weight * rank
    return PolicyLoss(loss, *(x.detach() for x in (policy, kl, rank, -ce, entropy)))
