"""What decoding costs in the engine, exact and with caches, beside the plain loop of fixed batches and its peers.

    python -m benchmarks.engine [--large | --block]

Prompts of 30 to 250 tokens, answers that end after 40 to 256 of at most 256, blocks of 32, one token a step. All take
the same model, prompts and settings, in turns: the plain loop, which is `denoise`; the engine; a loop that does what
dLLM's sampler does, and one that does what Dream's code does. The steps of the peers all cost the same, and so
do the blocks of the plain loop: the first are timed, and count for all. The lab's model, and one layer for more prompts
and other lengths; `--large`: four layers under Dream's vocabulary. On a CPU seconds are of processor time, which other
processes of a shared machine change least. Writes benchmarks/results/engine-<device>.json, or engine-large-.
"""

import argparse
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import torch

from benchmarks.blocks import block_costs, block_table, draw_requests
from benchmarks.caches import CACHES, agreement
from benchmarks.sampler import dream_steps
from benchmarks.tools.measure import environment, peak_memory_of, result_name, this_device, write_json
from benchmarks.tools.models import large_vocabulary, tiny_dream
from tabom.lab.dry_run import now
from tabom.models.diffusion_model import DiffusionModel, LogitRows
from tabom.models.loading import SHIPPED_PATH, load
from tabom.sampling.collect import in_groups
from tabom.sampling.completions import Completion, cost_of
from tabom.sampling.config import SamplerConfig
from tabom.sampling.engine import Engine, EngineConfig, Request
from tabom.sampling.sampler import denoise

LENGTH, BLOCK = 256, 32

PLAIN = "plain loop"
PEERS = ("dLLM's loop", "Dream's loop")

TIMED_STEPS = {PLAIN: BLOCK, **dict.fromkeys(PEERS, 4)}
"""Of the first batch; a whole block of the plain loop, whose steps read ever fewer rows of it through the head."""


class Asked(NamedTuple):
    """A prompt, and after how many tokens its answer ends, the end token included."""

    prompt: list[int]
    end: int


class Spread(NamedTuple):
    """How the lengths of prompts and answers are drawn, each by itself; on a logarithmic scale most are short."""

    prompts: tuple[int, int]
    answers: tuple[int, int]
    logarithmic: bool = False

    def draw(self, rng: random.Random, lengths: tuple[int, int]) -> int:
        """A length between the two."""
        low, high = lengths
        return (
            round(math.exp(rng.uniform(math.log(low), math.log(high)))) if self.logarithmic else rng.randint(*lengths)
        )


MOSTLY_SHORT = "wide, mostly short"

SPREADS = {
    "narrow": Spread((90, 110), (100, 120)),
    "wide": Spread((30, 250), (40, 256)),
    MOSTLY_SHORT: Spread((30, 250), (40, 256), logarithmic=True),
}


def asked_of(count: int, spread: str, seed: int = 0) -> list[Asked]:
    """Random tokens; the lengths of more prompts begin with those of fewer."""
    rng, lengths = random.Random(seed), SPREADS[spread]
    drawn = [(lengths.draw(rng, lengths.prompts), lengths.draw(rng, lengths.answers)) for _ in range(count)]
    return [Asked([rng.randrange(4, 40) for _ in range(length)], end) for length, end in drawn]


class Ends:
    """Which rows of the next forward predict an answer's end token; set by whoever runs the model."""

    rows: Callable[[], torch.Tensor]  # bool, in the shape of its positions

    def left_padded(self, asked: Sequence[Asked], length: int, logit_rows: LogitRows) -> None:
        """Prompts end in one column."""
        start = max(len(prompt) for prompt, _ in asked)
        self.fixed([logit_rows(start + end - 1) for _, end in asked], start + length)

    def right_padded(self, asked: Sequence[Asked], length: int, logit_rows: LogitRows) -> None:
        """Prompts begin in one column."""
        width = max(len(prompt) for prompt, _ in asked) + length
        self.fixed([logit_rows(len(prompt) + end - 1) for prompt, end in asked], width)

    def fixed(self, columns: list[int], width: int) -> None:
        """One position a sequence."""
        rows = torch.arange(width) == torch.tensor(columns)[:, None]
        self.rows = lambda: rows

    def packed(self, asked: Sequence[Asked], engine: Engine) -> None:
        """The engine's rows change with its slots, and with what a cache keeps."""

        def rows() -> torch.Tensor:
            marked = torch.zeros(len(engine.layout.position_ids), dtype=torch.bool)
            for slot, start in zip(engine.slots, engine.layout.starts, strict=True):
                prompt, end = asked[slot.number]
                marked[engine.model.logit_rows(start + len(prompt) + end - 1)] = True
            computed = None if engine.cache is None else engine.cache.rows
            return (marked if computed is None else marked[computed.cpu()])[None]

        self.rows = rows


@contextmanager
def answers_that_end(model: DiffusionModel) -> Iterator[Ends]:
    """The end token reads a hidden coordinate of its own, which is 0 but for the rows that are to predict it."""
    head, norm = model.model.get_output_embeddings(), model.model.get_decoder().norm
    ends = Ends()
    before = [(weight, weight.detach().clone()) for weight in (head.weight, norm.weight)]

    def add(_head: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        hidden = args[0].clone()
        hidden[..., 0] += 1e3 * ends.rows().to(hidden)
        return (hidden,)

    with torch.no_grad():
        norm.weight[0] = 0
        head.weight[:, 0] = 0
        head.weight[model.eos_token_id] = 0
        head.weight[model.eos_token_id, 0] = 1
    hook = head.register_forward_pre_hook(add)
    try:
        yield ends
    finally:
        hook.remove()
        with torch.no_grad():
            for weight, values in before:
                weight.copy_(values)


class Decoded(NamedTuple):
    """What a contender made: its responses where it went to the end, the positions computed, and seconds."""

    completions: list[Completion] | None
    positions: int
    seconds: float


class Enough(Exception):
    """The steps that were asked for are done."""


def run_plain(
    model: DiffusionModel, ends: Ends, asked: Sequence[Asked], config: SamplerConfig, batch_size: int, limit: int | None
) -> Decoded:
    """Fixed batches, each decoded by `denoise` until all of its responses are done."""
    completions, positions, start = [], 0, seconds_now(model.device)
    for batch in in_groups(asked, batch_size):
        ends.left_padded(batch, config.max_new_tokens, model.logit_rows)
        states = denoise(model, [prompt for prompt, _ in batch], config.max_new_tokens, config)
        *_, state = islice(states, limit and limit + 1)
        completions += [Completion(*row, 0) for row in zip(*(values.tolist() for values in state[:3]), strict=True)]
        positions += state.positions
    return Decoded(completions, positions, seconds_now(model.device) - start)


def run_engine(
    model: DiffusionModel, ends: Ends, asked: Sequence[Asked], config: SamplerConfig, batch_size: int, limit: int | None
) -> Decoded:
    """The engine under a budget of as many positions as a plain batch has at most."""
    budget = batch_size * (max(len(prompt) for prompt, _ in asked) + config.max_new_tokens)
    steps = 0

    def count(_decision: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == limit:
            raise Enough

    start = seconds_now(model.device)
    engine = Engine(model, config, EngineConfig(compute_budget=budget), count)
    ends.packed(asked, engine)
    requests = [Request(prompt, config.max_new_tokens, 0) for prompt, _ in asked]
    with suppress(Enough):
        finished = dict(engine.run(requests))
        completions = [finished[number] for number in range(len(asked))]
        return Decoded(completions, cost_of(completions).positions, seconds_now(model.device) - start)
    return Decoded(None, 0, seconds_now(model.device) - start)


@torch.inference_mode()
def dllm_steps(model: DiffusionModel, prompts: list[list[int]], config: SamplerConfig) -> Iterator[torch.Tensor]:
    """dLLM's masked-diffusion sampler, greedy, by confidence, one token a step; yields all (B, L) tokens after each.

    Right-padded, all logits at every step, an argmax and a softmax of all of them, the choice sequence by sequence. The
    mask token is suppressed, which is an option there.
    """
    lengths = [len(prompt) for prompt in prompts]
    x = torch.full((len(prompts), max(lengths) + config.max_new_tokens), model.eos_token_id, device=model.device)
    attention_mask = torch.zeros_like(x)
    for row, prompt in enumerate(prompts):
        end = len(prompt) + config.max_new_tokens
        x[row, : len(prompt)] = torch.tensor(prompt, device=model.device)
        x[row, len(prompt) : end] = model.mask_token_id
        attention_mask[row, :end] = 1
    block = config.block_length or config.max_new_tokens
    for block_end in range(block, config.max_new_tokens + 1, block):
        for _ in range(block):
            masked = x == model.mask_token_id
            logits = model.model(input_ids=x, attention_mask=attention_mask).logits
            logits[..., model.mask_token_id] = -torch.inf
            if model.logits_shift:
                logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
            token = logits.argmax(-1)
            confidence = logits.softmax(-1).gather(-1, token[..., None]).squeeze(-1)
            for row, length in enumerate(lengths):
                confidence[row, length + block_end :] = -torch.inf
            confidence = torch.where(masked, confidence, -torch.inf)
            for row in range(len(x)):
                best = confidence[row].topk(1).indices
                x[row, best] = token[row, best]
            yield x


def run_peer(
    name: str, model: DiffusionModel, ends: Ends, batch: Sequence[Asked], config: SamplerConfig, limit: int | None
) -> Decoded:
    """One fixed batch, every step of it."""
    prompts = [prompt for prompt, _ in batch]
    if name == PEERS[0]:
        ends.right_padded(batch, config.max_new_tokens, model.logit_rows)
        steps = dllm_steps(model, prompts, config)
    else:
        ends.left_padded(batch, config.max_new_tokens, model.logit_rows)
        dream = replace(config, policy="dream_entropy", steps=config.max_new_tokens, block_length=None)
        steps = dream_steps(model, prompts, dream)
    positions, start = 0, seconds_now(model.device)
    for x in islice(steps, limit):
        positions += x.numel()
    return Decoded(None, positions, seconds_now(model.device) - start)


def measure(
    name: str, model: DiffusionModel, contenders: Sequence[str], count: int, spread: str, batch_size: int
) -> list[dict[str, Any]]:
    """One record a contender, which take turns."""
    config = SamplerConfig(max_new_tokens=LENGTH, block_length=BLOCK, policy="confidence", stop_early=True)
    asked = asked_of(count, spread)
    tokens = sum(end for _, end in asked)
    with answers_that_end(model) as ends:

        def run(contender: str, limit: int | None = None) -> Decoded:
            if contender in PEERS:
                return run_peer(contender, model, ends, asked[:batch_size], config, limit)
            if contender == PLAIN:
                return run_plain(model, ends, asked[:batch_size], config, batch_size, limit)
            return run_engine(model, ends, asked, replace(config, **CACHES[contender]), batch_size, limit)

        made = {contender: run(contender, TIMED_STEPS.get(contender)) for contender in contenders}
        memory = {contender: peak_memory_of(lambda c=contender: run(c, 3), model.device) for contender in contenders}
    exact = made["exact"].completions
    steps = [max(completion.decoding_order) + 1 for completion in exact]
    of_fixed_batches = {PLAIN: batch_positions(asked, steps, batch_size)}
    of_fixed_batches |= dict.fromkeys(PEERS, batch_positions(asked, [LENGTH] * count, batch_size))
    records = []
    for contender, decoded in made.items():
        positions = of_fixed_batches.get(contender, decoded.positions)
        seconds = decoded.seconds * positions / decoded.positions
        record = {"model": name, "contender": contender, "prompts": count, "lengths": spread, "batch_size": batch_size}
        record |= {"answer_tokens": tokens, "positions": positions, "fewer": of_fixed_batches[PLAIN] / positions}
        record |= {"seconds": seconds, "tokens_per_second": tokens / seconds, "peak_bytes": memory[contender]}
        if contender in CACHES:
            record |= {"tokens_decided": cost_of(decoded.completions).tokens, **agreement(decoded.completions, exact)}
        records.append(record)
    return records


def batch_positions(asked: Sequence[Asked], steps: Sequence[int], batch_size: int) -> int:
    """What fixed batches compute, by arithmetic: each of them, padded, until its last response has had its steps."""
    return sum(
        len(batch) * max(steps for _, steps in batch) * (max(len(each.prompt) for each, _ in batch) + LENGTH)
        for batch in in_groups(zip(asked, steps, strict=True), batch_size)
    )


def seconds_now(device: torch.device) -> float:
    """Of the wall's clock on a GPU, of the processor on a CPU."""
    return time.process_time() if device.type == "cpu" else now(device)


def costs_table(records: list[dict[str, Any]]) -> str:
    """Positions, time and memory of each contender, and how many times fewer and faster than the plain loop."""
    lines = [
        "| model, prompts by batch, lengths | | positions an answer's token | fewer | tokens a second | faster | MiB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for record in records:
        case = ""
        if record["contender"] == PLAIN:
            plain = record
            case = f"{record['model']}, {record['prompts']} by {record['batch_size']}, {record['lengths']}"
        cells = (
            case,
            record["contender"],
            f"{record['positions'] / record['answer_tokens']:.0f}",
            f"{record['fewer']:.2f}",
            f"{record['tokens_per_second']:.1f}",
            f"{plain['seconds'] / record['seconds']:.2f}",
            f"{record['peak_bytes'] / 2**20:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def costs() -> Iterator[list[dict[str, Any]]]:
    """The lab's model beside all peers; other lengths, more prompts and larger batches on one layer."""
    lab_model = load(SHIPPED_PATH)
    lab_model.model.config.max_position_embeddings = 2 * LENGTH  # what it answers to longer prompts does not matter
    yield measure("the lab's", lab_model, [PLAIN, "exact", "block", *PEERS], 16, MOSTLY_SHORT, 16)
    one_layer = tiny_dream(num_hidden_layers=1)
    for spread in SPREADS:
        yield measure("one layer", one_layer, [PLAIN, "exact", "block"], 16, spread, 16)
    contenders = [PLAIN, "exact", "prefix", "block", "block, refresh 8", *PEERS]
    yield measure("one layer", one_layer, contenders, 32, MOSTLY_SHORT, 16)
    yield measure("one layer", one_layer, [PLAIN, "exact", "block"], 64, MOSTLY_SHORT, 16)
    for spread in ("wide", MOSTLY_SHORT):
        yield measure("one layer", one_layer, [PLAIN, "exact", "block"], 128, spread, 32)


def large_costs() -> Iterator[list[dict[str, Any]]]:
    """Under Dream's vocabulary, fewer prompts, 4 at a time."""
    yield measure(*large_vocabulary(this_device()), [PLAIN, "exact", "block", *PEERS], 8, MOSTLY_SHORT, 4)


def main() -> None:
    """One of the three measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--large", action="store_true", help="four layers under Dream's vocabulary")
    which.add_argument("--block", action="store_true", help="block-causal attention, see benchmarks.blocks")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = this_device()
    if arguments.block:
        records = list(block_costs(draw_requests(8), seconds_now))
        path = write_json(result_name("engine-block", device), environment(device) | {"figures": records})
        print(f"{block_table(records)}\nwrote {path}")
        return
    name, records = result_name("engine-large" if arguments.large else "engine", device), []
    for figures in large_costs() if arguments.large else costs():
        records += figures
        path = write_json(name, environment(device) | {"figures": records})
    print(costs_table(records))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
