"""The engine against `denoise`, each prompt alone, in fp64, where no near tie turns with the shape of a batch."""

import copy
import os
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedConfig, Qwen2Config, Qwen2ForCausalLM, modeling_flash_attention_utils

from benchmarks.tools.measure import peak_memory_of
from tabom.lab.dry_run import DREAM_7B
from tabom.models.compiled import padded_rows
from tabom.models.diffusion_model import describe
from tabom.models.packed import Span, packed_logits, takes_packed_rows
from tabom.sampling.budget import bytes_per_position, default_budget
from tabom.sampling.completions import Completion, cost_of
from tabom.sampling.config import FINDS_ITS_PACE, SamplerConfig
from tabom.sampling.engine import Engine, EngineConfig, Request, sample
from tabom.sampling.policies import POLICIES
from tabom.sampling.sampler import denoise
from tests.conftest import random_model


def fp64_model(seed, logits_shift=0, **changes):
    """Its end token is likely, so that responses end early."""
    model = random_model(seed, **changes)
    model.model.double()
    with torch.no_grad():
        model.model.lm_head.weight[model.eos_token_id] *= -3
    object.__setattr__(model, "logits_shift", logits_shift)
    return model


MODELS = [fp64_model(1), fp64_model(4, logits_shift=1, num_key_value_heads=2)]


def alone(model, request, config):
    """The specification: one prompt, decoded by `denoise`."""
    *_, state = denoise(model, [request.prompt], request.length, config, [request.seed])
    row = (values[0].tolist() for values in state[:3])
    return Completion(*row, state.positions)


def run(model, requests, config, *arguments):
    """Completions in the order of the requests."""
    finished = list(Engine(model, config, *arguments).run(iter(requests)))
    assert sorted(number for number, _ in finished) == list(range(len(requests)))
    return [completion for _, completion in sorted(finished)]


def assert_same(completions, expected, positions=True):
    for ours, theirs in zip(completions, expected, strict=True):
        assert (ours.token_ids, ours.decoding_order) == (theirs.token_ids, theirs.decoding_order)
        assert ours.entropy == pytest.approx(theirs.entropy, abs=1e-9)
        assert not positions or ours.positions == theirs.positions


@contextmanager
def rows_through(module):
    """The number of rows of every forward of a module."""
    seen = []
    hook = module.register_forward_hook(lambda _module, args, _output: seen.append(args[0].shape[:2].numel()))
    yield seen
    hook.remove()


@st.composite
def configs(draw):
    """Settings of every policy of full attention, for responses of 4, 8 and 12 tokens."""
    policy = draw(st.sampled_from(sorted(name for name, policy in POLICIES.items() if not policy.begins_alone)))
    options = {
        "policy": policy,
        "block_length": draw(st.sampled_from([None, 2, 4])),
        "temperature": draw(st.sampled_from([0.0, 0.0, 0.7])),
        "top_p": draw(st.sampled_from([None, 0.9])),
        "stop_early": draw(st.booleans()),
        "threshold": 0.3,
        "entropy_bound": 1.0,
    }
    if policy.startswith("dream_"):
        options["steps"] = draw(st.sampled_from([12, 24])) if options["block_length"] else draw(st.integers(1, 9))
    elif policy not in FINDS_ITS_PACE:
        options["tokens_per_step"] = draw(st.integers(1, 3))
    if policy not in FINDS_ITS_PACE and "random" not in policy and policy != "dream_origin":
        options["alg_temp"] = draw(st.sampled_from([0.0, 0.5]))
    return SamplerConfig(**options)


REQUESTS = st.lists(
    st.builds(
        Request,
        prompt=st.lists(st.integers(4, 40), min_size=1, max_size=9),
        length=st.sampled_from([4, 8, 12]),
        seed=st.integers(0, 9),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    model=st.sampled_from(MODELS),
    config=configs(),
    requests=REQUESTS,
    compute_budget=st.integers(1, 80),
    look_every=st.integers(1, 3),
)
def test_every_request_gets_what_it_gets_alone(model, config, requests, compute_budget, look_every):
    """Whatever the lengths, plans, budget and looks, and though slots stand at different steps."""
    completions = run(model, requests, config, EngineConfig(compute_budget, look_every))
    assert_same(completions, [alone(model, request, config) for request in requests], positions=look_every == 1)


@pytest.mark.parametrize("stop_early", [False, True])
def test_positions_are_the_rows_that_the_embedding_sees(rng, stop_early):
    model, config = MODELS[0], SamplerConfig(block_length=4, stop_early=stop_early)
    requests = [Request([rng.randrange(4, 40) for _ in range(rng.randrange(1, 20))], 16, i) for i in range(12)]
    with rows_through(model.model.get_input_embeddings()) as computed:
        completions = run(model, requests, config, EngineConfig(100))
    assert sum(c.positions for c in completions) == sum(computed)
    assert max(computed) <= 100
    decided = sum(step >= 0 for c in completions for step in c.decoding_order)
    assert cost_of(completions).positions_per_token == sum(computed) / decided
    steps = [max(c.decoding_order) + 1 for c in completions]
    assert [c.positions for c in completions] == [
        n * (len(r.prompt) + 16) for n, r in zip(steps, requests, strict=True)
    ], "a finished response leaves at once, and no padding is computed"
    assert not stop_early or min(steps) < 16

    with rows_through(model.model.get_input_embeddings()) as computed:
        *_, state = denoise(model, [r.prompt for r in requests], 16, config)
    assert state.positions == sum(computed) > sum(c.positions for c in completions)


def steps_of_dream(tokens, steps, eps=1e-3):
    """How many of a block's steps unmask something: its own loop, counted."""
    times, unmasking = torch.linspace(1, eps, steps + 1), 0
    for i in range(steps):
        count = int(tokens * (1 - times[i + 1] / times[i])) if i < steps - 1 else tokens
        tokens, unmasking = tokens - count, unmasking + (count > 0)
    return unmasking


@pytest.mark.parametrize("steps, block_length", [(8, None), (24, None), (24, 4), (2, None)])
def test_a_step_that_unmasks_nothing_by_its_plan_is_not_computed(steps, block_length):
    """Dream's schedule: nothing in step 0 at steps = length, and more such steps where there are more than tokens."""
    model, blocks = MODELS[1], 8 // (block_length or 8)
    config = SamplerConfig(
        policy="dream_entropy", alg_temp=0.5, temperature=0.7, steps=steps, block_length=block_length
    )
    unmasking = blocks * steps_of_dream(8 // blocks, steps // blocks)
    assert unmasking < steps or steps == 2
    request = Request([5, 6, 7], 8, 3)
    with rows_through(model.model.get_input_embeddings()) as computed:
        states = list(denoise(model, [request.prompt], 8, config, [request.seed]))
    assert len(computed) == unmasking and len(states) == steps + 1
    assert states[-1].positions == sum(computed)
    numbers = states[-1].decoding_order[0].tolist()
    assert len(set(numbers)) == unmasking and max(numbers) == steps - 1, "steps are numbered as planned"
    with rows_through(model.model.get_input_embeddings()) as computed:
        completions = run(model, [request] * 2, config)
    assert len(computed) == unmasking
    assert_same(completions, [alone(model, request, config)] * 2)


def test_a_request_over_the_budget_is_decoded_alone(rng):
    requests = [Request([5] * n, 4, 0) for n in (3, 30, 3, 3)]
    with rows_through(MODELS[0].model.get_input_embeddings()) as computed:
        run(MODELS[0], requests, SamplerConfig(), EngineConfig(compute_budget=14))
    assert computed == [7] * 4 + [34] * 4 + [14] * 4


def test_requests_are_taken_as_slots_become_free():
    """From an endless stream, in which nothing is read before there is room for it."""
    taken = []

    def stream():
        for i in range(10**9):
            taken.append(i)
            yield Request([5, 6, 7 + i % 3], 4, 0)

    finished = Engine(MODELS[0], SamplerConfig(), EngineConfig(21)).run(stream())
    assert {next(finished)[0] for _ in range(6)} == set(range(6)) and len(taken) <= 10
    finished.close()


def test_an_engine_runs_again_after_it_was_left_in_the_middle():
    engine = Engine(MODELS[0], SamplerConfig(), EngineConfig(14))
    requests = [Request([5 + i, 6, 7], 4, i) for i in range(4)]
    next(iter(engine.run(requests)))
    assert_same(dict(engine.run(requests)).values(), [alone(MODELS[0], r, SamplerConfig()) for r in requests])
    assert list(engine.run([])) == [] and sample(MODELS[0], [], SamplerConfig()) == []


def test_head_and_last_mlp_see_only_what_is_read():
    model = MODELS[0]
    layers = model.model.model.layers
    requests = [Request([5, 6, 7], 4, 0), Request([5, 6, 7, 8, 9], 4, 0)]
    with (
        rows_through(layers[0].mlp) as first,
        rows_through(layers[-1].mlp) as last,
        rows_through(layers[-1].self_attn.o_proj) as output,
    ):
        run(model, requests, SamplerConfig(block_length=2))
    assert first == [16] * 4 and last == output == [4, 2, 4, 2]


def test_packed_logits_are_those_of_every_sequence_alone(rng):
    model = MODELS[1].model
    sequences = [torch.randint(4, 40, (n,)) for n in (5, 5, 9, 1, 3, 3)]
    ids, positions = torch.cat(sequences), torch.cat([torch.arange(len(s)) for s in sequences])
    rows = torch.randperm(len(ids))[:10]
    with torch.inference_mode():
        packed = packed_logits(model, ids, positions, [Span(len(s), len(s), len(s)) for s in sequences], rows)
        expected = torch.cat([model(input_ids=s[None]).logits[0] for s in sequences])[rows]
        torch.testing.assert_close(packed, expected, rtol=1e-12, atol=1e-12)
        assert model.config._attn_implementation == "sdpa", "the model is left as it was"
        assert model(input_ids=sequences[0][None]).logits.shape == (1, 5, model.config.vocab_size)


def test_a_model_that_takes_no_packed_rows_decodes_runs_of_like_lengths(rng, seed):
    """Windows of attention, for one, which a packed row would smear over its sequences."""
    config = Qwen2Config(
        vocab_size=45,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
        mask_token_id=3,
    )
    config.is_causal = False
    torch.manual_seed(seed)
    model = describe(Qwen2ForCausalLM(config).eval().double(), MODELS[0].tokenizer)
    with torch.no_grad():
        model.model.lm_head.weight.mul_(20)
    assert not takes_packed_rows(model.model)
    requests = [Request([rng.randrange(4, 40) for _ in range(rng.choice([3, 3, 12]))], 4, i) for i in range(6)]
    with rows_through(model.model.get_input_embeddings()) as computed:
        completions = run(model, requests, SamplerConfig(), EngineConfig(look_every=3))
    assert_same(completions, [alone(model, request, SamplerConfig()) for request in requests])
    assert sum(computed) == sum(c.positions for c in completions)
    with pytest.raises(ValueError, match="cache='block': model type 'qwen2' has none"):
        Engine(model, SamplerConfig(cache="block"))


def test_an_observer_sees_the_entropies_of_all_candidates_at_every_step():
    model, seen = MODELS[0], []
    requests = [Request([5, 6], 4, 0), Request([7], 4, 0)]
    run(model, requests, SamplerConfig(), EngineConfig(), lambda decision: seen.append(decision))
    assert len(seen) == 4
    for number, request in enumerate(requests):
        states = list(denoise(model, [request.prompt], 4, SamplerConfig()))
        for step, decision in enumerate(seen):
            slot = decision.requests.index(number)
            assert decision.step[slot] == step
            assert torch.equal(decision.candidates.masked[slot], states[step].decoding_order[0] < 0)
            assert torch.equal(decision.chosen[slot], states[step + 1].decoding_order[0] == step)
            chosen = decision.chosen[slot]
            torch.testing.assert_close(
                decision.candidates.entropy[slot][chosen], states[-1].entropy[0][chosen].double()
            )


class NoWait(TorchDispatchMode):
    """Refuses what would make the host wait for a device."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "repeat_interleave")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert name not in self.WAITS and not by_mask, name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"policy": "threshold"},
        {"policy": "entropy_bound"},
        {"policy": "random"},
        {"policy": "dream_origin", "steps": 8},
        {"policy": "dream_entropy", "steps": 8, "alg_temp": 0.3},
        {"temperature": 0.8, "stop_early": True},
    ],
    ids=str,
)
def test_a_step_waits_for_nothing(monkeypatch, options):
    """No op whose result the host must know, and none of the tensor's ways to Python numbers."""
    engine = Engine(MODELS[0], SamplerConfig(block_length=4, **options), EngineConfig(look_every=4))
    step, steps = engine.step, []

    def refuse(*_):
        raise AssertionError("a tensor was read by the host")

    def watched_step():
        with NoWait(), monkeypatch.context() as patches:
            for name in ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__"):
                patches.setattr(torch.Tensor, name, refuse)
            patches.setattr("tabom_kernels.arguments.values_are_checked", lambda _: False)  # as on a GPU
            patches.setattr(torch.Tensor, "is_cpu", False)
            step()
        steps.append(1)

    monkeypatch.setattr(engine, "step", watched_step)
    requests = [Request([5, 6, 7][: 1 + i % 3], 8, i) for i in range(4)]
    completions = [completion for _, completion in sorted(engine.run(requests))]
    monkeypatch.undo()
    assert steps
    assert_same(completions, [alone(MODELS[0], r, engine.config) for r in requests], positions=False)


def decode_with_dynamic_cache(model, request, config):
    """One prompt with transformers' own cache: keys and values outside the block, those of the last refresh."""
    tokens = torch.tensor([*request.prompt, *[model.mask_token_id] * request.length])
    order, step, shift, positions = torch.full((request.length,), -1), 0, model.logits_shift, 0
    plan = config.plan(request.length)
    for block in range(plan.count):
        start = len(request.prompt) + block * plan.size
        end = len(tokens) if config.cache == "prefix" else start + plan.size
        active = torch.arange(start - shift, end)
        kept = torch.tensor([i for i in range(len(tokens)) if i not in active.tolist()], dtype=torch.int64)
        outside = DynamicCache()
        for index in range(plan.steps):
            logits = torch.full((len(tokens), model.model.config.vocab_size), torch.nan, dtype=torch.float64)
            if index == 0 or (config.cache_refresh and index % config.cache_refresh == 0):
                computed, cache = torch.arange(len(tokens)), DynamicCache()
            else:
                computed, cache = active, copy.deepcopy(outside)
            inputs = {"input_ids": tokens[computed][None], "position_ids": computed[None], "past_key_values": cache}
            logits[computed] = model.model(**inputs, use_cache=True).logits[0].detach()
            positions += len(computed)
            if len(computed) == len(tokens):
                outside = cache
                for layer in outside.layers:
                    layer.keys, layer.values = layer.keys[:, :, kept].detach(), layer.values[:, :, kept].detach()
            p = logits[start - shift : start - shift + plan.size]
            p[:, model.mask_token_id] = -torch.inf
            p = p.softmax(-1)
            certainty = -torch.special.entr(p).sum(-1)
            certainty[order[block * plan.size :][: plan.size] >= 0] = -torch.inf
            best = certainty.argmax()
            tokens[start + best] = p[best].argmax()
            order[block * plan.size + best] = step
            step += 1
    return tokens[len(request.prompt) :].tolist(), order.tolist(), positions


@pytest.mark.parametrize("cache", ["prefix", "block"])
@pytest.mark.parametrize("cache_refresh", [None, 2, 3])
@pytest.mark.parametrize("model", MODELS, ids=["shift 0", "shift 1"])
def test_a_cache_holds_what_was_computed_at_the_last_refresh(rng, model, cache, cache_refresh):
    """Slots come and go in the middle of each other's blocks, refresh at different steps, and move among the rows."""
    config = SamplerConfig(cache=cache, cache_refresh=cache_refresh, block_length=8)
    lengths = [16, 3, 5, 16, 3, 8, 5]
    requests = [Request([rng.randrange(4, 40) for _ in range(rng.randrange(1, 8))], length, 0) for length in lengths]
    requests.append(Request([5] * 50, 8, 0))
    with rows_through(model.model.get_input_embeddings()) as computed:
        completions = run(model, requests, config, EngineConfig(50))
    assert sum(computed) == sum(c.positions for c in completions)
    for request, completion in zip(requests, completions, strict=True):
        expected = decode_with_dynamic_cache(model, request, config)
        assert (completion.token_ids, completion.decoding_order, completion.positions) == expected


@pytest.mark.parametrize("cache", ["prefix", "block"])
def test_a_cache_refreshed_at_every_step_is_exact(rng, cache):
    config = SamplerConfig(cache=cache, cache_refresh=1, block_length=4)
    requests = [Request([rng.randrange(4, 40) for _ in range(n)], 8, 0) for n in (1, 5, 5, 9)]
    exact = [alone(MODELS[1], request, SamplerConfig(block_length=4)) for request in requests]
    assert_same(run(MODELS[1], requests, config, EngineConfig(30)), exact)


def test_a_cache_saves_positions_and_is_refused_where_it_cannot_be(rng):
    requests = [Request([rng.randrange(4, 40) for _ in range(20)], 16, i) for i in range(3)]
    per_token = {}
    for cache in ("none", "prefix", "block"):
        completions = run(MODELS[0], requests, SamplerConfig(block_length=8, cache=cache))
        per_token[cache] = cost_of(completions).positions_per_token
    assert per_token == {"none": 36, "prefix": (2 * 36 + 7 * 16 + 7 * 8) / 16, "block": (2 * 36 + 14 * 8) / 16}
    with pytest.raises(ValueError, match="look_every=2 with cache='block'"):
        Engine(MODELS[0], SamplerConfig(cache="block"), EngineConfig(look_every=2))
    with pytest.raises(ValueError, match="cache='block': denoise does not use a cache"):
        next(denoise(MODELS[0], [[5]], 4, SamplerConfig(cache="block")))
    with pytest.raises(ValueError, match="cache_refresh=2 with cache='none'"):
        SamplerConfig(cache_refresh=2)
    with pytest.raises(ValueError, match="cache='all'"):
        SamplerConfig(cache="all")


@pytest.mark.parametrize("cache", ["none", "block"])
def test_a_compiled_model_decodes_as_it_does_eagerly_in_a_few_shapes(rng, monkeypatch, cache):
    """Slots come and go, so that nearly every step has another number of rows; the sizes that are compiled are few."""
    model = fp64_model(5, num_hidden_layers=3)
    config = SamplerConfig(block_length=4, cache=cache)
    requests = [Request([rng.randrange(4, 40) for _ in range(rng.randrange(1, 40))], 8, i) for i in range(12)]
    expected = run(model, requests, config, EngineConfig(150))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, mode, dynamic: compile(call, backend=counter, dynamic=dynamic))
    with rows_through(model.model.get_input_embeddings()) as computed:
        completions = run(model, requests, config, EngineConfig(150, compile="default"))
    assert_same(completions, expected, positions=False)
    assert sum(computed) == sum(c.positions for c in completions)
    shapes = set(computed)
    assert len(shapes) < len({padded_rows(n) for n in range(1, 151)}) and counter.frame_count <= 4 * len(shapes)
    assert not any(layer._compiled_call_impl for layer in model.model.get_decoder().layers)
    with rows_through(model.model.get_input_embeddings()) as computed:
        run(model, requests, config, EngineConfig(150, compile="default"))
    assert counter.frame_count <= 4 * len(shapes), "nothing is compiled twice"


def test_rows_are_padded_by_a_quarter_at_most_to_four_sizes_an_octave():
    sizes = {padded_rows(n) for n in range(1, 4097)}
    assert all(n <= padded_rows(n) <= max(64, 1.25 * n) for n in range(1, 4097)) and len(sizes) == 1 + 6 * 4
    assert {padded_rows(size) for size in sizes} == sizes


def test_what_cannot_be_compiled_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="compile='fast': expected one of none, default"):
        EngineConfig(compile="fast")
    monkeypatch.setattr(MODELS[0].model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ValueError, match=r"compile='default': .* attn_implementation='flash_attention_2'"):
        Engine(MODELS[0], SamplerConfig(), EngineConfig(compile="default"))


def test_budgets():
    assert 1 <= default_budget(MODELS[0]) <= 2**12
    with pytest.raises(ValueError, match="compute_budget=0"):
        EngineConfig(compute_budget=0)
    with pytest.raises(ValueError, match="look_every=0"):
        EngineConfig(look_every=0)


def test_the_budget_is_half_of_the_free_memory_over_what_a_position_takes(monkeypatch):
    """By hand for Dream-7B: logits thrice and two hidden rows; a cache keeps 28 layers of 2 * 4 * 128 beside them."""
    config = PreTrainedConfig.from_dict({**DREAM_7B, "head_dim": 128})
    network = SimpleNamespace(config=config, dtype=torch.bfloat16, device=torch.device("cuda"))
    model = SimpleNamespace(model=network, device=network.device)
    free = 20 * 10**9
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * 10**9))
    assert default_budget(model) == 20 * 10**9 // 2 // (2 * (2 * 3584 + 3 * 152064))
    free = 60 * 10**9
    assert default_budget(model) == 2**14, "no faster beyond"
    assert default_budget(model, keeps=True) == 60 * 10**9 // 2 // (2 * (2 * 3584 + 3 * 152064 + 28 * 2 * 4 * 128))
    free = 10**5
    assert default_budget(model) == 1, "one request at a time, where nothing is free"


@pytest.mark.parametrize(
    "changes",
    [{}, {"intermediate_size": 1024}, {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}],
    ids=["head", "MLP", "attention"],
)
@pytest.mark.parametrize("cache", ["none", "block"])
def test_a_step_takes_no_more_memory_than_the_budget_thinks(changes, cache):
    """And not much less: 64 sequences, all of whose logits are read but those of the prompt."""
    model = random_model(0, vocab_size=1000, **changes)
    requests = [Request([5], 31, i) for i in range(64)]
    config = SamplerConfig(block_length=None, cache=cache)

    def stop(_decision):
        raise InterruptedError

    def two_steps():
        with suppress(InterruptedError):
            list(Engine(model, config, EngineConfig(10**6), stop).run(requests))

    two_steps()
    held = peak_memory_of(two_steps, model.device) / (64 * 32)
    assert 0.3 < held / bytes_per_position(model.model.config, 4, cache != "none") < 1


def test_what_begins_hopelessly_is_given_up_as_it_stands(rng):
    """The others get what they get anyway; a given-up one computes no more."""
    config = SamplerConfig(block_length=1)
    requests = [Request([rng.randrange(4, 40) for _ in range(5)], 6, i) for i in range(6)]
    whole = run(MODELS[0], requests, config)
    asked = []

    def is_hopeless(number, beginning):
        asked.append((number, len(beginning)))
        assert beginning == whole[number].token_ids[: len(beginning)]
        return number % 2 == 0 and len(beginning) == 3

    completions = run(MODELS[0], requests, config, EngineConfig(40), None, is_hopeless)
    for number, (ours, theirs) in enumerate(zip(completions, whole, strict=True)):
        if number % 2:
            assert_same([ours], [theirs])
        else:
            assert ours.given_up and ours.token_ids[:3] == theirs.token_ids[:3]
            assert ours.decoding_order == [0, 1, 2, -1, -1, -1] and ours.positions == 3 * 11
            assert set(ours.token_ids[3:]) == {MODELS[0].pad_token_id}
    assert sorted(asked) == sorted((n, k) for n in range(6) for k in range(1, 4 if n % 2 == 0 else 6)), (
        "asked once each"
    )


def test_a_beginning_ends_where_something_is_masked():
    """Without blocks tokens appear in any order."""
    asked = []
    run(MODELS[0], [Request([5, 6], 8, 0)], SamplerConfig(), None, None, lambda _, ids: asked.append(ids))
    [whole] = run(MODELS[0], [Request([5, 6], 8, 0)], SamplerConfig())
    grown = [[i for i, step in enumerate(whole.decoding_order) if step > now] for now in range(7)]
    assert [len(ids) for ids in asked] == sorted({min(masked) for masked in grown} - {0})
    assert all(ids == whole.token_ids[: len(ids)] for ids in asked)


def varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale):
    """What flash-attention's variable-length kernel computes, sequence by sequence."""
    assert not causal and all(offsets.dtype == torch.int32 for offsets in (cu_seqlens_q, cu_seqlens_k))
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert (max(lengths_q), max(lengths_k)) == (max_seqlen_q, max_seqlen_k)
    outputs = []
    for parts in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True):
        heads_first = [part.transpose(0, 1) for part in parts]
        output = torch.nn.functional.scaled_dot_product_attention(*heads_first, scale=softmax_scale, enable_gqa=True)
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("cache", ["none", "prefix", "block"])
def test_flash_attention_gets_the_offsets_of_the_sequences(rng, monkeypatch, cache):
    """With its kernel re-derived here, as it runs on GPUs only: the same answers."""
    config = SamplerConfig(block_length=4, cache=cache)
    requests = [Request([rng.randrange(4, 40) for _ in range(n)], 8, 0) for n in (3, 3, 9, 1)]
    expected = run(MODELS[1], requests, config, EngineConfig(30))

    def settings_of(**given):
        passed = {name: given[name] for name in ("max_seqlen_q", "max_seqlen_k", "softmax_scale")}
        return passed | {"causal": given["is_causal"]}

    kernels = (None, varlen_attention, None, None, None), (settings_of, None)
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda _name: kernels)
    monkeypatch.setattr(MODELS[1].model.config, "_attn_implementation_internal", "flash_attention_2")
    assert_same(run(MODELS[1], requests, config, EngineConfig(30)), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_waits_for_nothing_on_a_gpu():
    model = fp64_model(1)
    model.model.cuda()
    engine = Engine(model, SamplerConfig(block_length=4, stop_early=True), EngineConfig(look_every=4))
    step = engine.step

    def watched_step():
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    engine.step = watched_step
    assert len(list(engine.run(Request([5, 6, 7][: 1 + i % 3], 8, i) for i in range(6)))) == 6


@pytest.mark.parametrize("cache", ["none", "block"])
def test_a_model_in_an_adapter_decodes_as_it_does_without(cache):
    """Its weights are 0 at first; evaluation in training decodes with it."""
    plain, adapted = fp64_model(1), fp64_model(1)
    wrapped = get_peft_model(adapted.model, LoraConfig(target_modules=["q_proj", "v_proj"])).eval()
    config = SamplerConfig(block_length=4, cache=cache)
    requests = [Request([5, 6, 7][: 1 + i], 8, i) for i in range(3)]
    assert_same(run(replace(adapted, model=wrapped), requests, config), run(plain, requests, config))


def test_the_default_budget_does_not_ask_linux_alone_for_the_free_memory(model, monkeypatch):
    """macOS has no SC_AVPHYS_PAGES, and os.sysconf raises a ValueError there."""

    def sysconf(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "sysconf", sysconf)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * 10**6))
    per_position = bytes_per_position(model.model.config, 4, keeps=False)
    assert default_budget(model) == 10**6 // per_position < 2**12
