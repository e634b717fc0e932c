"""The loss as the authors released it, written here from its formulas, against the trainer with their settings.

Their release: `hinge` over all i < j in the order of a stable sort by step (ties are pairs), trajectories with
s_max < M left out of both terms, cuts up to s_max - M, the cross-entropy averaged over the tokens of
a micro-batch, the rank loss over its sequences, both then over micro-batches; the entropy is -sum p log(p + 1e-10).
"""

import pytest
import torch

from tabom import load
from tabom.data.encoding import encode_prompt
from tabom.data.trajectories import Trajectory
from tabom.training.config import TabomConfig
from tabom.training.released import released_loss
from tabom.training.trainer import TabomTrainer
from tabom.training.windows import draw_cut, example_rng
from tabom_kernels import tabom_loss
from tests.models.test_families import write_dream, write_llada

M, MARGIN, RANK_WEIGHT, SEED, MICRO_BATCH, MICRO_BATCHES = 4, 0.2, 2.0, 11, 4, 2


def make_trajectories(rng):
    """Some shorter than the window, ties and tokens that were never decoded."""
    trajectories = []
    for length in (9, 3, 12, 7, 10, 4, 11, 8):
        order = [rng.randrange(-1, length) for _ in range(length)]
        trajectories.append(Trajectory("12+34"[: rng.randrange(1, 5)], "", rng.choices(range(4, 40), k=length), order))
    return trajectories


def loss_of_micro_batch(diffusion_model, indexed_trajectories):
    """Sequence by sequence, all logits, no library code but the draw of the cut."""
    token_losses, rank_losses = [], []
    for index, trajectory in indexed_trajectories:
        steps = torch.tensor(trajectory.decoding_order)
        if steps.max() < M:
            continue
        cut = draw_cut(steps.numpy(), int(steps.max()) - M, example_rng(SEED, 0, index))
        prompt, response = (
            encode_prompt(diffusion_model.tokenizer, trajectory.prompt),
            torch.tensor(trajectory.response_token_ids),
        )
        visible = (steps >= 0) & (steps < cut)
        shown = torch.where(visible, response, diffusion_model.mask_token_id)
        logits = diffusion_model.model(input_ids=torch.cat([torch.tensor(prompt), shown])[None]).logits[0]
        logits = logits[torch.arange(len(prompt), len(prompt) + len(response)) - diffusion_model.logits_shift]
        window = ((steps >= cut) & (steps < cut + M)).nonzero()[:, 0]
        token_losses.append(torch.nn.functional.cross_entropy(logits[window], response[window], reduction="none"))
        p = logits.softmax(-1)
        entropy = -(p * torch.log(p + 1e-10)).sum(-1)
        ordered = entropy[window[steps[window].sort(stable=True).indices]]
        pairs = [(ordered[i] - ordered[j] + MARGIN).relu() for j in range(len(ordered)) for i in range(j)]
        if pairs:
            rank_losses.append(torch.stack(pairs).mean())
    return torch.cat(token_losses).mean() + RANK_WEIGHT * torch.stack(rank_losses).mean()


def test_the_released_loss_that_is_timed_is_the_hinge_loss(rng):
    """Three sequences: with pairs, without a pair, without rows."""
    logits = torch.randn(3, 8, 20, requires_grad=True)
    rows, labels = torch.tensor([1, 2, 3, 4, 9, 10]), torch.randint(20, (6,))
    steps, cu_seqlens = torch.tensor([2, 0, -1, 1, 3, 3]), torch.tensor([0, 4, 6, 6], dtype=torch.int32)
    settings = {"margin": MARGIN, "rank_weight": RANK_WEIGHT}
    released = released_loss(logits, rows, labels, steps, cu_seqlens, **settings)
    (grad,) = torch.autograd.grad(released, logits)
    loss = tabom_loss(logits.flatten(0, 1)[rows], labels, steps, cu_seqlens, form="hinge", **settings).loss
    (expected,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(released, loss)
    torch.testing.assert_close(grad, expected)
    no_pair = released_loss(logits, rows, labels, torch.full((6,), -1), cu_seqlens, **settings)
    torch.testing.assert_close(no_pair, torch.nn.functional.cross_entropy(logits.flatten(0, 1)[rows], labels))


@pytest.mark.parametrize("write", [write_dream, write_llada])
def test_one_step_with_the_authors_settings_has_the_gradient_of_their_formulas(tmp_path, rng, write):
    write(tmp_path)
    diffusion_model, expected = load(tmp_path), load(tmp_path)
    trajectories = make_trajectories(rng)
    args = TabomConfig(
        output_dir=str(tmp_path / "run"),
        rank_loss="hinge",
        rank_margin=MARGIN,
        rank_weight=RANK_WEIGHT,
        supervised_window=M,
        rank_window=M,
        skip_last_step=True,
        rank_ties=True,
        drop_short=True,
        loss_average="micro_batch",
        seed=SEED,
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=MICRO_BATCHES,
        train_sampling_strategy="sequential",
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = TabomTrainer(
        diffusion_model.model, args, train_dataset=trajectories, processing_class=diffusion_model.tokenizer
    )
    before = {name: p.detach().clone() for name, p in diffusion_model.model.named_parameters()}
    trainer.train()

    indexed = list(enumerate(trajectories))
    loss = sum(loss_of_micro_batch(expected, indexed[i : i + MICRO_BATCH]) for i in (0, MICRO_BATCH)) / MICRO_BATCHES
    loss.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    for name, p in expected.model.named_parameters():
        taken = before[name] - diffusion_model.model.get_parameter(name)
        torch.testing.assert_close(taken, p.grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
