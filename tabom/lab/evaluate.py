"""Measures a model on the lab's tasks. Every measure is a list of scores in [0, 1], one a problem."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import comb

import numpy as np
import torch

from tabom.collator import TrajectoryCollator
from tabom.encoding import encode_prompt
from tabom.lab.tasks import Problem, Task
from tabom.metrics import count_pairs_in_order
from tabom.models import DiffusionModel, logits_at
from tabom.objectives import Target
from tabom.sampler import Completion, SamplerConfig, decode_response, sample
from tabom.trajectories import Trajectory
from tabom.windows import window_at
from tabom_kernels import softmax_entropy

Scores = dict[str, np.ndarray]
"""Measure -> its scores, one a problem."""

BATCH_SIZE = 128
PASS_AT = (1, 2, 4, 8, 16)


def answer(model: DiffusionModel, task: Task, problems: Sequence[Problem], config: SamplerConfig) -> list[Completion]:
    """One completion a problem."""
    config = replace(config, max_new_tokens=task.response_length)
    encoded = [encode_prompt(model.tokenizer, problem.prompt) for problem in problems]
    batches = (encoded[start : start + BATCH_SIZE] for start in range(0, len(encoded), BATCH_SIZE))
    return [completion for batch in batches for completion in sample(model, batch, config)]


def accuracy(model: DiffusionModel, task: Task, problems: Sequence[Problem], config: SamplerConfig) -> np.ndarray:
    """1 where the answer is right, 0 elsewhere."""
    return grade(model, task, problems, answer(model, task, problems, config))


def grade(
    model: DiffusionModel, task: Task, problems: Sequence[Problem], completions: Sequence[Completion]
) -> np.ndarray:
    """1 where the completion is right, 0 elsewhere."""
    responses = [decode_response(model, completion.token_ids) for completion in completions]
    return np.array([task.is_correct(p, r) for p, r in zip(problems, responses, strict=True)], dtype=float)


def pass_at_k(
    model: DiffusionModel,
    task: Task,
    problems: Sequence[Problem],
    temperature: float,
    on_sample: Callable[[], None],
) -> dict[int, np.ndarray]:
    """The unbiased estimate of pass@k (arXiv 2107.03374, eq. 1) from max(k) samples a problem."""
    n = max(PASS_AT)
    right = np.zeros(len(problems), dtype=int)
    for seed in range(n):
        config = SamplerConfig(temperature=temperature, seed=seed)
        right += accuracy(model, task, problems, config).astype(int)
        on_sample()
    return {k: np.array([1 - comb(n - c, k) / comb(n, k) for c in right]) for k in PASS_AT}


@torch.inference_mode()
def order_accuracy(model: DiffusionModel, trajectories: Sequence[Trajectory]) -> np.ndarray:
    """Share of the pairs still to be unmasked whose earlier position has the lower entropy, one score a trajectory.

    Each trajectory is replayed at every cut that leaves a pair, and the pairs of all its cuts are counted together.
    """
    collate = TrajectoryCollator(model.mask_token_id, model.pad_token_id, model.logits_shift)
    scores = []
    for trajectory in trajectories:
        prompt = encode_prompt(model.tokenizer, trajectory.prompt)
        targets = [replay(trajectory, cut) for cut in range(max(trajectory.decoding_order))]
        batch = collate([(prompt, trajectory.response_token_ids, target) for target in targets])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        logits = logits_at(
            model.model, batch["rows"], input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        )
        counts = count_pairs_in_order(softmax_entropy(logits), batch["steps"], batch["cu_seqlens"])
        scores.append((counts.in_order / counts.pairs).item())
    return np.array(scores)


def replay(trajectory: Trajectory, cut: int) -> Target:
    """Everything from `cut` on is masked and ranked, nothing supervised."""
    steps = np.asarray(trajectory.decoding_order)
    window = window_at(steps, cut, supervised_window=0, rank_window=len(steps))
    return Target(
        masked=~window.visible,
        supervised=window.supervised,
        steps=np.where(window.ranked, steps, -1),
        token_weights=np.ones(len(steps), dtype=np.float32),
        num_tokens=0,
    )


def entropy_by_step(completions: Sequence[Completion]) -> np.ndarray:
    """Mean entropy (nats) of the tokens unmasked at each step."""
    steps = np.concatenate([completion.decoding_order for completion in completions])
    entropies = np.concatenate([completion.entropy for completion in completions])
    return np.bincount(steps, entropies) / np.bincount(steps)
