"""Token and certainty of each masked position, which a sampler step needs."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tabom_kernels.arguments import check_logits, check_rows, check_scalar
from tabom_kernels.backends import reference
from tabom_kernels.backends.selection import Backend, load, resolve
from tabom_kernels.noise import row_keys
from tabom_kernels.ops.derivatives import call_directly


class UnmaskStatistics(NamedTuple):
    """Per row (N,): the token (int64), its probability, the margin between the two best, and the entropy (nats)."""

    token: Tensor
    probability: Tensor
    margin: Tensor
    entropy: Tensor


@torch.library.custom_op("tabom_kernels::unmask_statistics", mutates_args=())
def unmask_statistics_op(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, keys: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token, probability, margin and entropy, each (N,)."""
    return load(backend).unmask_statistics(logits, temperature, top_k, top_p, keys)


@unmask_statistics_op.register_fake
def _(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    dtype = reference.working_dtype(logits.dtype)
    return tuple(logits.new_empty(logits.shape[0], dtype=d) for d in (torch.int64, dtype, dtype, dtype))


def filters_that_cut(logits: Tensor, top_k: int | None, top_p: float | None) -> tuple[int | None, float | None]:
    """top_k and top_p, None for a filter that keeps all tokens: a top_k of at least V, or a top_p that rounds to 1."""
    ulp_below_one = torch.finfo(reference.working_dtype(logits.dtype)).eps / 2
    return (
        None if top_k is None or top_k >= logits.shape[1] else top_k,
        None if top_p is None or 1 - top_p <= ulp_below_one / 2 else top_p,
    )


@torch.no_grad()
def filter_logits(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """(N, V) logits / temperature, -inf outside top-k and then top-p: what `unmask_statistics` draws tokens from.

    Args:
        logits: (N, V) of any floating dtype.
    """
    backend = resolve(backend, logits)
    top_k, top_p = filters_that_cut(logits, top_k, top_p)
    if backend == "reference":
        kept = reference.filter_logits(logits.to(reference.working_dtype(logits.dtype)) / temperature, top_k, top_p)
        return kept.to(logits.dtype)
    thresholds = load(backend).filter_thresholds(logits, temperature, top_k, top_p)
    scaled = logits / temperature
    return scaled if thresholds is None else scaled.masked_fill_(logits < thresholds[:, None], -torch.inf)


@torch.no_grad()
def unmask_statistics(
    logits: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | Tensor | None = None,
    backend: Backend | None = None,
) -> UnmaskStatistics:
    """Chooses a token for each row, and measures how certain the model is of it.

    At temperature 0 the token is the argmax, the lowest index among equals. Above 0 it is drawn from
    softmax(logits / temperature), down to the rarest token (`reference.draw`), after top-k and then top-p
    (transformers' order; logits that tie with the last one kept are kept). `probability`, `margin` (best minus second
    best probability; 1 when V = 1) and `entropy` are those of softmax(logits), without temperature and filters. This
    entropy is the one that TABOM trains.

    Args:
        logits: (N, V) of any floating dtype; -inf is never chosen.
        top_k: at least 1.
        top_p: in (0, 1]; 1, or a number that rounds to 1 in fp32 (fp64 for fp64 logits), filters nothing.
        generator: a torch.Generator (None: the global one), or an (N,) int64 tensor of keys (see `mix_keys`). With keys
            a row's token depends on its logits and its key alone, and not on the rest of the batch.
        backend: "triton", "torch" or "reference"; None takes `backend_for(logits)`.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or setting is wrong, or the backend does not exist.
    """
    check_logits(logits)
    check_scalar("temperature", temperature, lambda x: 0 <= x < math.inf, "0 (greedy) or above, and finite")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: expected at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: expected a probability mass in (0, 1]")
    if isinstance(generator, Tensor):
        check_rows("generator", generator, logits.shape[0], (torch.int64,), logits.device)
    keys = row_keys(generator, logits.shape[0], logits.device) if temperature > 0 else None
    backend = resolve(backend, logits)
    top_k, top_p = filters_that_cut(logits, top_k, top_p)
    if backend == "reference":
        return UnmaskStatistics(*reference.unmask_statistics(logits, temperature, top_k, top_p, keys))
    return UnmaskStatistics(*call_directly(unmask_statistics_op, logits, temperature, top_k, top_p, keys, backend))
