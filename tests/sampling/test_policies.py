"""Dream's and LLaDA's generation, re-derived here step by step on tiny random models, against the sampler."""

import pytest
import torch

from tabom.sampling.completions import is_decided
from tabom.sampling.config import FINDS_ITS_PACE, POLICY_NAMES, RANDOM_ORDER, SamplerConfig
from tabom.sampling.engine import sample
from tabom.sampling.policies import (
    POLICIES,
    Candidates,
    Step,
    above_threshold,
    by_chance,
    choose,
    strictly_above_threshold,
    within_entropy_bound,
)
from tabom.sampling.sampler import denoise
from tabom_kernels import mix_keys, reference
from tabom_kernels.noise import uniform_noise
from tests.conftest import random_model

LENGTH = 8


@pytest.fixture
def model(seed):
    """In fp64, where no near tie turns with the shape of the batch; with Dream's shift."""
    model = random_model(seed)
    model.model.double()
    object.__setattr__(model, "logits_shift", 1)
    return model


@pytest.fixture
def prompts(rng):
    """Of one length, as the originals' batches are."""
    return [[rng.randrange(4, 40) for _ in range(5)] for _ in range(3)]


def shifted_logits(model, x):
    """Logits of every position, Dream's moved to the right; the mask token is never chosen."""
    logits = model.model(input_ids=x).logits.detach()
    if model.logits_shift:
        logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
    logits[..., model.mask_token_id] = -torch.inf
    return logits


def dream_filter(logits, temperature, top_p, top_k):
    """Temperature, then nucleus by a sort, then the k best, as Dream's code does."""
    if temperature > 0:
        logits = logits / temperature
    if top_p is not None:
        ordered, indices = logits.sort(-1, descending=True)
        remove = ordered.softmax(-1).cumsum(-1) > top_p
        remove[..., 1:] = remove[..., :-1].clone()
        remove[..., 0] = False
        logits = logits.masked_fill(torch.zeros_like(remove).scatter(-1, indices, remove), -torch.inf)
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    return logits


def random_numbers(seed, step, batch):
    """The keys of all response positions at a step, (B, T)."""
    return mix_keys(torch.full((batch, 1), seed), step, torch.arange(LENGTH)[None])


def dream_generate(model, prompts, config):
    """Over all positions of the sequence; returns tokens and the step of each."""
    x = torch.tensor([prompt + [model.mask_token_id] * LENGTH for prompt in prompts])
    batch, start = len(prompts), len(prompts[0])
    order = torch.full((batch, LENGTH), -1)
    times = torch.linspace(1, config.eps, config.steps + 1)
    for i in range(config.steps):
        masked = x[:, start:] == model.mask_token_id
        logits = dream_filter(shifted_logits(model, x)[:, start:], config.temperature, config.top_p, config.top_k)
        p = logits.softmax(-1)
        keys = random_numbers(config.seed, i, batch)
        token = logits.argmax(-1)
        if config.temperature > 0:
            token = reference.draw(p.flatten(0, 1), keys.flatten()).view(batch, LENGTH)
        transferred = 1 - times[i + 1] / times[i] if i < config.steps - 1 else 1
        if config.policy == "dream_origin":
            chosen = masked & (uniform_noise(mix_keys(keys, 1)) < transferred)
        else:
            top = p.topk(2).values
            confidence = {
                "dream_maskgit_plus": p.gather(-1, token[..., None])[..., 0],
                "dream_topk_margin": top[..., 0] - top[..., 1],
                "dream_entropy": -torch.special.entr(p).sum(-1),
            }[config.policy].masked_fill(~masked, -torch.inf)
            number = int(masked.sum() / batch * transferred)
            if config.alg_temp > 0:  # multinomial without replacement of softmax(confidence / alg_temp)
                confidence = confidence / config.alg_temp - (-uniform_noise(mix_keys(keys, 1)).log()).log()
            best = confidence.sort(dim=1, descending=True, stable=True).indices[:, :number]  # topk leaves ties open
            chosen = torch.zeros_like(masked).scatter(1, best, True)
        x[:, start:] = torch.where(chosen, token, x[:, start:])
        order[chosen] = i
    return x[:, start:].tolist(), order.tolist()


@pytest.mark.parametrize("policy", ["dream_origin", "dream_maskgit_plus", "dream_topk_margin", "dream_entropy"])
@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 8},
        {"steps": 3, "eps": 0.5},
        {"steps": 20},
        {"steps": 5, "temperature": 0.7},
        {"steps": 5, "top_p": 0.8},
        {"steps": 4, "temperature": 1.3, "top_p": 0.9, "top_k": 4},
        {"steps": 6, "alg_temp": 0.2},
    ],
    ids=str,
)
def test_dreams_generation(model, prompts, seed, policy, settings):
    if policy == "dream_origin" and "alg_temp" in settings:
        settings = {"steps": 6}
    config = SamplerConfig(max_new_tokens=LENGTH, policy=policy, seed=seed, **settings)
    completions = sample(model, prompts, config)
    tokens, order = dream_generate(model, prompts, config)
    assert [c.token_ids for c in completions] == tokens
    # Dream does not say when; a step that unmasks nothing counts
    assert [c.decoding_order for c in completions] == order


def llada_generate(model, prompts, config):
    """Block by block, an even split of the tokens over the steps, one sequence at a time."""
    blocks = LENGTH // config.block_length
    per_block = config.steps // blocks
    results = []
    for prompt in prompts:
        x = torch.tensor([prompt + [model.mask_token_id] * LENGTH])
        order, step = torch.full((LENGTH,), -1), 0
        for block in range(blocks):
            few, more = divmod(config.block_length, per_block)
            for i in range(per_block):
                logits = shifted_logits(model, x)[0, len(prompt) :]
                keys = random_numbers(config.seed, step, 1)[0]
                token = logits.argmax(-1)
                if config.temperature > 0:
                    token = reference.draw((logits / config.temperature).softmax(-1), keys)
                if config.policy == "llada_low_confidence":
                    confidence = logits.softmax(-1).gather(-1, token[:, None])[:, 0]
                else:
                    confidence = 1 - uniform_noise(mix_keys(keys, 1))
                confidence[order >= 0] = -torch.inf
                confidence[(block + 1) * config.block_length :] = -torch.inf
                chosen = confidence.topk(few + (i < more)).indices
                x[0, len(prompt) + chosen] = token[chosen]
                order[chosen] = step
                step += 1
        results.append((x[0, len(prompt) :].tolist(), order.tolist()))
    return results


@pytest.mark.parametrize("policy", ["llada_low_confidence", "llada_random"])
@pytest.mark.parametrize("block_length, steps", [(8, 8), (4, 8), (4, 6), (8, 3), (2, 4)])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_lladas_generation(model, prompts, seed, policy, block_length, steps, temperature):
    object.__setattr__(model, "logits_shift", 0)
    settings = {"block_length": block_length, "steps": steps, "temperature": temperature}
    config = SamplerConfig(max_new_tokens=LENGTH, policy=policy, seed=seed, **settings)
    completions = sample(model, prompts, config)
    assert [(c.token_ids, c.decoding_order) for c in completions] == llada_generate(model, prompts, config)


def adaptive_generate(model, prompt, config):
    """Threshold and entropy bound on one sequence, position by position in Python."""
    x = torch.tensor([prompt + [model.mask_token_id] * LENGTH])
    order = [-1] * LENGTH
    for step in range(LENGTH):
        p = shifted_logits(model, x)[0, len(prompt) :].softmax(-1)
        masked = [i for i in range(LENGTH) if order[i] < 0]
        if not masked:
            break
        if config.policy == "threshold":
            best = max(masked, key=lambda i: p[i].max())
            chosen = {best, *(i for i in masked if p[i].max() >= config.threshold)}
        else:
            entropy = {i: torch.special.entr(p[i]).sum().item() for i in masked}
            masked.sort(key=entropy.get)
            sums = [sum(entropy[i] for i in masked[:k]) - entropy[masked[k - 1]] for k in range(1, len(masked) + 1)]
            chosen = masked[: sum(total <= config.entropy_bound for total in sums)]
        for i in chosen:
            x[0, len(prompt) + i] = p[i].argmax()
            order[i] = step
    return x[0, len(prompt) :].tolist(), order


@pytest.mark.parametrize(
    "settings",
    [{"policy": "threshold", "threshold": t} for t in (0.2, 0.5, 1.0)]
    + [{"policy": "entropy_bound", "entropy_bound": b} for b in (0.0, 0.5, 3.0)],
    ids=str,
)
def test_policies_that_find_their_own_pace(model, prompts, settings):
    config = SamplerConfig(max_new_tokens=LENGTH, **settings)
    completions = sample(model, prompts, config)
    expected = [adaptive_generate(model, prompt, config) for prompt in prompts]
    assert [(c.token_ids, c.decoding_order) for c in completions] == expected


def test_sequences_of_a_batch_finish_at_their_own_pace(model, prompts):
    config = SamplerConfig(max_new_tokens=LENGTH, policy="threshold", threshold=0.3)
    together = sample(model, prompts, config)
    alone = [sample(model, [prompt], config)[0] for prompt in prompts]
    assert [c[:2] for c in together] == [c[:2] for c in alone]


def test_positions_are_drawn_by_the_softmax_of_their_certainty(rng):
    """100 000 draws of one of three candidates."""
    count, alg_temp = 100_000, 0.5
    probability = torch.tensor([0.1, 0.9, 0.4, 0.6]).expand(count, 4)
    masked = torch.tensor([True, False, True, True]).expand(count, 4)
    uniform = uniform_noise(torch.arange(4 * count) + rng.randrange(2**40)).view(count, 4)
    candidates = Candidates(masked, probability, probability, probability, uniform)
    config = SamplerConfig(policy="confidence", alg_temp=alg_temp)
    chosen = choose(candidates, Step(0, 4, 4), config).double().mean(0)
    expected = (probability[0] / alg_temp).masked_fill(~masked[0], -torch.inf).softmax(0).double()
    assert (chosen - expected).abs().max() < 5 * (0.25 / count) ** 0.5


@pytest.mark.parametrize("policy", ["entropy", "threshold", "dream_maskgit_plus"])
def test_decoding_stops_once_all_before_the_first_end_token_is_decided(seed, policy):
    """The response up to its first end token is that of a full decoding; the rest is padding, never unmasked."""
    model = random_model(seed)
    with torch.no_grad():  # the end token is likely, but not everywhere
        model.model.lm_head.weight[model.eos_token_id] = 1.5 * model.model.lm_head.weight[7]
    prompts = [[5, 6, 7], [8, 9], [20, 21, 22, 23]]
    seen = []
    model.model.get_output_embeddings().register_forward_hook(lambda _head, _args, out: seen.append(out.shape[0]))
    full, full_rows = sample(model, prompts, SamplerConfig(max_new_tokens=12, policy=policy)), sum(seen)
    seen.clear()
    early = sample(model, prompts, SamplerConfig(max_new_tokens=12, policy=policy, stop_early=True))
    assert sum(seen) <= full_rows
    for a, b in zip(early, full, strict=True):
        undecided = a.decoding_order.count(-1)
        if undecided:
            end = a.token_ids.index(model.eos_token_id)
            assert a.token_ids[: end + 1] == b.token_ids[: end + 1]
            assert a.decoding_order[: end + 1] == b.decoding_order[: end + 1]
            assert -1 not in a.decoding_order[:end]
        for step, token, in_full in zip(a.decoding_order, a.token_ids, b.token_ids, strict=True):
            assert token == (in_full if step >= 0 else model.pad_token_id)


def test_a_response_is_decided_when_nothing_is_masked_before_its_first_end_token():
    tokens = torch.tensor([[5, 1, 9, 1], [9, 1, 5, 6], [5, 6, 7, 8], [5, 1, 6, 1], [1, 9, 9, 9], [5, 1, 9, 9]])
    order = torch.tensor([[0, 1, -1, 2], [-1, 0, 1, 2], [0, 1, 2, 3], [-1, -1, 0, 1], [0, -1, -1, -1], [0, -1, 1, -1]])
    assert is_decided(tokens, order, eos_token_id=1).tolist() == [True, False, False, False, True, False]
    assert not is_decided(tokens, order, eos_token_id=None).any()


def test_early_stopping_saves_steps(seed):
    model = random_model(seed)
    with torch.no_grad():
        model.model.lm_head.weight.zero_()
    model.model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.model.config.vocab_size))
    model.model.lm_head.bias.data[model.eos_token_id] = 9.0
    states = list(denoise(model, [[5, 6], [7]], 8, SamplerConfig(stop_early=True)))
    assert len(states) == 3  # before, the leftmost position at once an end token, and the padding
    assert states[-1].decoding_order.tolist() == [[0] + [-1] * 7] * 2
    assert states[-1].tokens.tolist() == [[model.eos_token_id] + [model.pad_token_id] * 7] * 2


@pytest.mark.parametrize(
    "settings, error",
    [
        ({"policy": "threshold", "steps": 4}, "steps=4 with policy='threshold'"),
        ({"policy": "entropy_bound", "tokens_per_step": 2}, "tokens_per_step=2 with policy='entropy_bound'"),
        ({"policy": "dream_entropy", "tokens_per_step": 2}, "tokens_per_step=2 with policy='dream_entropy'"),
        ({"policy": "dream_origin", "alg_temp": 0.1}, "alg_temp=0.1 with policy='dream_origin'"),
        ({"eps": 0.0}, r"eps=0\.0"),
        ({"entropy_bound": -1.0}, r"entropy_bound=-1\.0"),
    ],
)
def test_settings_that_a_policy_does_not_use_are_refused_by_name(settings, error):
    with pytest.raises(ValueError, match=error):
        SamplerConfig(**settings)


@pytest.mark.parametrize("policy", ["confidence", "margin", "threshold"])
def test_what_rounds_to_a_probability_of_one_is_told_apart(policy):
    """1 - p of 1e-12 and 1e-9 are both p = 1 in fp32, and the entropies are exact."""
    entropy = torch.tensor([[3e-8, 5e-11, 2e-6, 1e-12]])
    one_but = torch.tensor([[1.0, 1.0, 1 - 2.0**-24, 1.0]])
    masked = torch.ones(1, 4, dtype=torch.bool)
    candidates = Candidates(masked, one_but, one_but, entropy, torch.rand(1, 4))
    order = POLICIES[policy].certainty(candidates).argsort(dim=1, descending=True)
    assert order.tolist() == [[3, 1, 0, 2]]


def test_the_settings_know_every_policy_without_importing_it():
    assert tuple(POLICIES) == POLICY_NAMES
    assert {name for name, policy in POLICIES.items() if policy.certainty is by_chance} == set(RANDOM_ORDER)
    own_pace = (above_threshold, strictly_above_threshold, within_entropy_bound)
    assert {name for name, policy in POLICIES.items() if policy.count in own_pace} == set(FINDS_ITS_PACE)
