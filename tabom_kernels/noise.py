"""Random numbers from a key and a counter, without a state, so that a row's numbers do not depend on its batch."""

import torch
from torch import Tensor

from tabom_kernels.arguments import INTEGERS, check_dtype

# SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), as signed 64-bit integers, whose products wrap around.
GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64
MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
MIX_2 = 0x94D049BB133111EB - 2**64

SEGMENT = 256
"""Columns of a segment. A draw chooses a segment and then a column, so it does not need a number for each column."""


def mix_keys(*parts: int | Tensor) -> Tensor:
    """An int64 key that depends on every part and their order; int32 or int64 tensors broadcast.

    Raises:
        TypeError: a part is of another kind.
        ValueError: a number does not fit 64 bits.
    """
    device = next((part.device for part in parts if isinstance(part, Tensor)), None)
    key = torch.zeros((), dtype=torch.int64, device=device)
    for index, part in enumerate(parts):
        if isinstance(part, int):
            if not -(2**63) <= part < 2**63:
                raise ValueError(
                    f"parts[{index}]={part}: expected an integer of 64 bits, at least -2^63 and below 2^63"
                )
        else:
            check_dtype(f"parts[{index}]", part, INTEGERS)
            part = part.long()  # otherwise int32 would cut off the upper half of a 0-dim key
        key = split_mix(key ^ part)
    return key


def exponential_noise(keys: Tensor, counters: Tensor) -> Tensor:
    """(N, C) standard exponential noise in fp32, from the SplitMix64 streams that are seeded with `keys` (N,).

    The 64 bits k at a counter are a uniform number u = (k + 1/2) / 2^64, and the noise is -log u. Near u = 1 it is
    computed from 1 - u, so that numbers from 2^-65 to 45 have all the digits of fp32.

    Args:
        counters: int64, (C,) or (N, C); 0 is the first output of the stream.
    """
    bits = split_mix(keys[:, None] + counters * GOLDEN_GAMMA)
    distance = ((bits ^ (bits >> 63)).float() + 0.5) * 2.0**-64  # from the nearer of 0 and 1
    return -torch.where(bits < 0, distance.neg().log1p(), distance.log())


def uniform_noise(keys: Tensor) -> Tensor:
    """(N,) uniform numbers in (0, 1), fp64, one an int64 key: (k + 1/2) / 2^52 for a 52-bit k."""
    return (shift_right(split_mix(keys), 12).double() + 0.5) * 2.0**-52


def row_keys(generator: torch.Generator | Tensor | None, rows: int, device: torch.device) -> Tensor:
    """(N,) keys: those that are given, or keys derived from one number of a generator."""
    if isinstance(generator, Tensor):
        return generator
    source = device if generator is None else generator.device
    draw = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, generator=generator, device=source)
    return mix_keys(draw.to(device), torch.arange(rows, device=device))


def split_mix(state: Tensor) -> Tensor:
    """One output of SplitMix64: adds the golden gamma to the state and mixes."""
    x = state + GOLDEN_GAMMA  # in place from here on, as this is most of the cost of a draw on a CPU
    x ^= shift_right(x, 30)
    x *= MIX_1
    x ^= shift_right(x, 27)
    x *= MIX_2
    x ^= shift_right(x, 31)
    return x


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: the upper bits become 0."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)
