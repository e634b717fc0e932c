"""What the closed-form functions of the backends return, and the change that a model makes to its logits.

The backends `torch` and `triton` are modules whose functions have the same names, arguments and results, and compute
without autograd. These are the types that they share.
"""

from typing import NamedTuple

from torch import Tensor


class VocabularyStatistics(NamedTuple):
    """Per row (N,), nats: the cross-entropy (None without labels), the entropy, and what the gradient needs.

    `maximum` is the largest logit of a row, and `log_sum` the logarithm of the sum of exp(logit - maximum).
    """

    cross_entropy: Tensor | None
    entropy: Tensor
    maximum: Tensor
    log_sum: Tensor


class RankLoss(NamedTuple):
    """Per sequence (B,): the loss, the number of ordered pairs and the gradient by the temperature.

    `grad_entropy` (N,) is the gradient of each row's entropy by the loss of its own sequence.
    """

    loss: Tensor
    pairs: Tensor
    grad_entropy: Tensor
    grad_temperature: Tensor


class LogitTransform(NamedTuple):
    """Replaces every logit z by `softcap * tanh(scale * z / softcap)`, or by `scale * z` without a soft-cap."""

    scale: float = 1.0
    softcap: float | None = None

    def apply_(self, z: Tensor, derivative: Tensor | None = None) -> Tensor:
        """Transforms z in place, and writes the derivative to `derivative`, which has the shape of z."""
        if self.softcap is None:
            if derivative is not None:
                derivative.fill_(self.scale)
            return z.mul_(self.scale)
        z.mul_(self.scale / self.softcap).tanh_()
        if derivative is not None:
            derivative.copy_(z).square_().neg_().add_(1.0).mul_(self.scale)
        return z.mul_(self.softcap)
