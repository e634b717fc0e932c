"""Cross-entropy, entropy and their gradient by the logits, in closed form.

For a row of logits z with the label y, with d = z - max z, S' = the sum of exp(d) without the largest logit, and
U = sum exp(d) * d,

    log S = log1p(S')        E = log S - U / (1 + S')        ce = log S - d_y
    dz = p * (a - g * (log p + E)) - a * [column == y]       for a = dL/dce and g = dL/dE,

with p = exp(d) / S and log p = d - log S, so that factors which are equal for all columns of a row are computed once.
`max z` and `log S` are kept apart, because at |z| ~ 1e4 their fp32 sum has lost three digits. S' is summed without its
1 where it is small, because 1 + 1e-12 rounds to 1 in fp32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tabom_kernels.backends.results import LogitTransform, VocabularyStatistics
from tabom_kernels.backends.torch.chunks import map_row_chunks

SMALL_SUM = 1 / 16
"""Below this, S' is summed by itself. Above it, the logarithm of 1 + S' keeps six digits in fp32."""

LOWEST = -1e4
"""Replaces d = -inf: exp(LOWEST) is exactly 0 in every dtype, and 0 * LOWEST is 0, where 0 * -inf is NaN."""


def vocabulary_statistics(
    logits: Tensor, labels: Tensor | None, ignore_index: int, transform: LogitTransform | None = None
) -> VocabularyStatistics:
    """The statistics of (N, V) logits, or of the transformed logits; the logits are read once.

    The cross-entropy of a row whose label is `ignore_index` is 0.
    """

    def statistics_of(logits: Tensor, labels: Tensor | None, d: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        z = read(logits, d, transform)
        maximum = z.amax(-1)
        torch.sub(z, maximum[:, None], out=d)
        nll = None if labels is None else F.nll_loss(d, labels, reduction="none", ignore_index=ignore_index)
        total = torch.exp(d.clamp_(min=LOWEST), out=p).sum(-1)
        # On another device the test would wait for the device.
        if total.is_cpu and (total.numel() == 0 or total.amin().item() >= 1 + SMALL_SUM):
            log_sum = total.log()
        else:
            sum_without_max = total - 1.0
            exact = p.masked_fill_(d == 0, 0.0).sum(-1)
            sum_without_max = torch.where(sum_without_max < SMALL_SUM, exact, sum_without_max)
            log_sum = sum_without_max.log1p()
        entropy = log_sum - p.mul_(d).sum(-1).div_(total)
        return (entropy, maximum, log_sum) if nll is None else (entropy, maximum, log_sum, nll.add_(log_sum))

    parts = map_row_chunks(statistics_of, 2, logits, labels)
    entropy, maximum, log_sum, *ce = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    ce = ce[0].masked_fill_(labels == ignore_index, 0.0) if ce else None
    return VocabularyStatistics(ce, entropy, maximum, log_sum)


def vocabulary_gradient(
    logits: Tensor,
    labels: Tensor | None,
    ignore_index: int,
    statistics: VocabularyStatistics,
    grad_ce: Tensor | None,
    grad_entropy: Tensor | None,
    out: Tensor,
    upstream: Tensor | None = None,
    transform: LogitTransform | None = None,
) -> Tensor:
    """Writes dL/dlogits (N, V) to `out`, which may be `logits` itself; the logits are read once.

    A row whose two gradients are 0 gets a gradient of 0, whatever its logits are.

    Args:
        statistics: those of the rows; the cross-entropy is not used.
        grad_ce, grad_entropy: (N,) dL/dce and dL/dE of any stride; None stands for zeros.
        upstream: () a factor of both.
        transform: the one of the statistics; the gradient is by the logits before it.
    """
    a, g = (x if x is None or upstream is None else x * upstream for x in (grad_ce, grad_entropy))
    label = None
    if a is not None:
        is_ignored = labels == ignore_index
        a, label = a.masked_fill(is_ignored, 0.0), labels.masked_fill(is_ignored, 0)[:, None]
    writes_directly = out.dtype == statistics.entropy.dtype

    def gradient_of(
        logits: Tensor,
        out: Tensor,
        label: Tensor | None,
        entropy: Tensor,
        maximum: Tensor,
        log_sum: Tensor,
        a: Tensor | None,
        g: Tensor | None,
        d: Tensor,
        *memory: Tensor,
    ) -> None:
        derivative = None if transform is None else memory[-1]
        dz = out if writes_directly else memory[0]
        torch.sub(read(logits, d, transform, derivative), maximum[:, None], out=d)
        if g is not None:
            d.clamp_(min=LOWEST)
        torch.exp(d, out=dz)
        if label is not None:
            # p - 1 loses all of its digits if p is close to 1 and rounded, so the label's column is computed by itself.
            log_p = d.gather(1, label).squeeze(1).sub_(log_sum)
            dz_label = log_p.expm1().mul_(a)
            if g is not None:
                dz_label -= log_p.exp() * (log_p + entropy) * g
        share = log_sum.neg().exp_()  # p = exp(d) * share
        factor = 0.0 if a is None else (a * share)[:, None]
        if g is not None:
            g = (g * share)[:, None]
            factor = d.mul_(-g).add_(g * (log_sum - entropy)[:, None] + factor)
        dz.mul_(factor)
        if label is not None:
            dz.scatter_(1, label, dz_label[:, None])
        if derivative is not None:
            dz.mul_(derivative)
        if not writes_directly:
            out.copy_(dz)

    buffers = 2 - writes_directly + (transform is not None)
    map_row_chunks(gradient_of, buffers, logits, out, label, *statistics[1:], a, g)
    is_unused = a == 0 if g is None else (g == 0 if a is None else (a == 0) & (g == 0))
    if not out.is_cpu:  # reading the mask would wait for the device
        return out.masked_fill_(is_unused[:, None], 0.0)
    unused = is_unused.nonzero().squeeze(1)
    return out.index_fill_(0, unused, 0.0) if len(unused) else out


def read(logits: Tensor, memory: Tensor, transform: LogitTransform | None, derivative: Tensor | None = None) -> Tensor:
    """The transformed logits in the dtype of `memory`, written there unless the logits can be used as they are."""
    if logits.dtype == memory.dtype and transform is None:
        return logits
    z = memory.copy_(logits)
    return z if transform is None else transform.apply_(z, derivative)
