"""Decodes requests and measures each decoding: order of certainty, TDS, steps and positions computed."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from tabom.evaluation.metrics import count_pairs_in_order, tds
from tabom.models.diffusion_model import DiffusionModel
from tabom.sampling.completions import Completion
from tabom.sampling.config import SamplerConfig
from tabom.sampling.engine import Decision, Engine, EngineConfig, Request


class Measured(NamedTuple):
    """A completion and the measurements of its decoding.

    Tokens after the first end token count only in `positions`. With blocks, a step sees only the masked positions of
    its block.
    """

    completion: Completion
    tokens: int
    steps: int  # denoising steps that unmasked something
    positions: int  # rows that went through the model's body for this response
    in_order: int  # pairs seen by a step, of which the earlier position had the lower entropy
    pairs: int
    tds: float  # nats^2


def decode_measured(
    model: DiffusionModel, requests: Iterable[Request], config: SamplerConfig, engine: EngineConfig | None = None
) -> Iterator[tuple[int, Measured]]:
    """Decodes requests; yields the number of each request with its measurements, in the order they finish."""
    seen: dict[int, list[torch.Tensor]] = defaultdict(list)

    def keep(decision: Decision) -> None:
        masked, entropy = decision.candidates.masked, decision.candidates.entropy
        for number, row in zip(decision.requests, entropy.masked_fill(~masked, torch.nan).cpu(), strict=True):
            seen[number].append(row)

    for number, completion in Engine(model, config, engine, keep).run(requests):
        steps = [row[: len(completion.token_ids)] for row in seen.pop(number)]
        yield number, measure(model, completion, torch.stack(steps).double())


def measure(model: DiffusionModel, completion: Completion, entropy: torch.Tensor) -> Measured:
    """Measures a decoding of T tokens.

    Args:
        entropy: (S, T) nats of the candidates of its S steps, NaN where a position was no candidate.
    """
    is_end = np.array(completion.token_ids) == model.eos_token_id
    counts = is_end.cumsum() - is_end == 0  # True up to the first end token, which counts
    order = torch.tensor(completion.decoding_order)
    masked = entropy.isfinite() & torch.from_numpy(counts)
    in_order = pairs = 0
    for seen, of_step in zip(entropy, masked, strict=True):
        rows = torch.tensor([0, int(of_step.sum())])
        found = count_pairs_in_order(seen[of_step], order[of_step], rows)
        in_order, pairs = in_order + int(found.in_order), pairs + int(found.pairs)
    return Measured(
        completion,
        tokens=int((is_end.cumsum() == 0).sum()),
        steps=len(set(completion.decoding_order) - {-1}),
        positions=completion.positions,
        in_order=in_order,
        pairs=pairs,
        tds=tds(entropy.nan_to_num().numpy(), masked.numpy()),
    )
