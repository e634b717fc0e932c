"""What decoding costs with block-causal attention: the engine beside the plain loop that the authors ship.

    python -m benchmarks.engine --block

Prompts of 30 to 250 tokens, answers of 40 to 256, blocks of 4 and 32, one token a step, on random weights under SDAR's
vocabulary. Both keep the keys and values of finished blocks. The loop decodes one prompt after the other and runs a
finished block once more; the engine decodes many at once, and computes a finished block together with the first step of
the next one. The tokens of both are compared. The floor is (block size x steps of the block + block size) positions a
block, and the prompt once. Seconds are of processor time on a CPU, in turns. Writes
benchmarks/results/engine-block-<device>.json.
"""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, Qwen3ForCausalLM

from benchmarks.tools.measure import this_device
from benchmarks.tools.models import SMALL, sharpened
from tabom.lab.model import character_tokenizer
from tabom.models.attention import as_bias, block_causal_mask
from tabom.models.diffusion_model import DiffusionModel, describe
from tabom.models.families import native_config
from tabom.sampling.completions import cost_of
from tabom.sampling.config import SamplerConfig
from tabom.sampling.engine import Engine, Request

BLOCKS = (4, 32)

Choose = Callable[[Tensor, Tensor, int], Tensor]
"""The positions of a block to unmask: from the probability of the best token at each of its positions, which of them
are masked, and the number of the step in the block."""


def most_probable(probability: Tensor, masked: Tensor, _step: int) -> Tensor:
    """The masked position with the highest probability."""
    return probability.masked_fill(~masked, -1).argmax()[None]


@torch.inference_mode()
def authors_loop(
    model: DiffusionModel, prompt: Sequence[int], length: int, choose: Choose, first_token: bool = False
) -> tuple[list[int], list[int], int]:
    """Decodes one prompt: masks are denoised behind the stored keys, and a finished block is run again for its own.

    Args:
        length: of the response, tokens; it is rounded up to whole blocks.
        first_token: the first token of a block comes from the last logits before it (Fast-dLLM v2).

    Returns:
        The tokens, the step of each, and how many positions were computed.
    """
    size, positions, cache = model.block_size, 0, DynamicCache()
    blocks = -(-(len(prompt) + length) // size)
    x = torch.tensor([*prompt, *[model.mask_token_id] * (blocks * size - len(prompt))], device=model.device)
    order = torch.full_like(x, -1)

    def run(start: int, end: int, kept: DynamicCache) -> Tensor:
        nonlocal positions
        positions += end - start
        place = torch.arange(end, device=model.device)
        bias = as_bias(block_causal_mask(place[start:], place, size), model.model.dtype)
        inputs = {
            "input_ids": x[None, start:end],
            "position_ids": place[None, start:],
            "attention_mask": bias[None, None],
        }
        return model.model(**inputs, past_key_values=kept, use_cache=True).logits[0]

    first, step = len(prompt) // size, 0
    last = run(0, first * size, cache)[-1] if first else None
    for block in range(first, blocks):
        start, end, index = block * size, (block + 1) * size, 0
        if first_token and x[start] == model.mask_token_id:
            last[model.mask_token_id] = -torch.inf
            x[start], order[start], step = last.argmax(), step, step + 1
        while (masked := x[start:end] == model.mask_token_id).any():
            logits = run(start, end, copy.deepcopy(cache))
            if model.logits_shift:
                logits = torch.cat([logits[:1] if last is None else last[None], logits[:-1]])
            logits[:, model.mask_token_id] = -torch.inf
            best = logits.softmax(-1).max(-1)
            chosen = choose(best.values, masked, index)
            x[start:end][chosen] = best.indices[chosen]
            order[start:end][chosen] = step
            step, index = step + 1, index + 1
        last = run(start, end, cache)[-1]
    return x[len(prompt) :].tolist(), order[len(prompt) :].tolist(), positions


def random_sdar(block_size: int, device: torch.device, **changes: int) -> DiffusionModel:
    """Four layers of 64 with random weights under SDAR's vocabulary, or what the config says instead."""
    settings = {"model_type": "sdar", "vocab_size": 151936, "block_size": block_size, "tie_word_embeddings": False}
    settings |= SMALL | {"hidden_size": 64, "intermediate_size": 256, "head_dim": 16} | changes
    model = Qwen3ForCausalLM(native_config(settings)).to(device)
    return sharpened(describe(model, character_tokenizer()))


def draw_requests(count: int, seed: int = 0) -> list[Request]:
    """Prompts of random tokens, each with the length of its answer."""
    rng = random.Random(seed)
    return [
        Request([rng.randrange(4, 40) for _ in range(rng.randint(30, 250))], rng.randint(40, 256), 0)
        for _ in range(count)
    ]


def floor(request: Request, block_size: int) -> int:
    """The positions of one token a step: each block once a step and once more, and the prompt's whole blocks once."""
    first = len(request.prompt) // block_size
    blocks = -(-(len(request.prompt) + request.length) // block_size)
    steps = blocks * block_size - len(request.prompt)
    return first * block_size + block_size * steps + block_size * (blocks - first)


def block_costs(requests: Sequence[Request], seconds: Callable[[torch.device], float]) -> Iterator[dict[str, Any]]:
    """One record a block size.

    Raises:
        AssertionError: the engine decides another token than the loop.
    """
    for block_size in BLOCKS:
        model = random_sdar(block_size, this_device())
        config = SamplerConfig(policy="confidence")
        began = seconds(model.device)
        finished = dict(Engine(model, config).run(requests))
        middle = seconds(model.device)
        loop = [authors_loop(model, request.prompt, request.length, most_probable) for request in requests]
        ended = seconds(model.device)
        completions = [finished[number] for number in range(len(requests))]
        same = [each.token_ids == tokens for each, (tokens, _, _) in zip(completions, loop, strict=True)]
        assert sum(same) >= 0.9 * len(same), "where two certainties are nearly equal, rounding may decide"
        cost = cost_of(completions)
        yield {
            "block_size": block_size,
            "prompts": len(requests),
            "tokens": cost.tokens,
            "same_answers": sum(same),
            "floor": sum(floor(request, block_size) for request in requests) / cost.tokens,
            "engine": cost.positions_per_token,
            "loop": sum(positions for _, _, positions in loop) / cost.tokens,
            "full_attention": sum((len(r.prompt) + r.length) * r.length for r in requests) / cost.tokens,
            "seconds_of_engine": middle - began,
            "seconds_of_loop": ended - middle,
        }


def block_table(records: Sequence[dict[str, Any]]) -> str:
    """Positions a decided token, and how many times faster the engine is than the loop."""
    lines = [
        "| block | floor | engine | the authors' loop | full attention | the loop's time over the engine's |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for record in records:
        ratio = record["seconds_of_loop"] / record["seconds_of_engine"]
        columns = [f"{record[name]:.2f}" for name in ("floor", "engine", "loop")]
        lines.append(
            f"| {record['block_size']} | {' | '.join(columns)} | {record['full_attention']:.0f} | {ratio:.1f} |"
        )
    return "\n".join(lines)
