"""The policy loss and the log-probabilities of a linear head."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tabom_kernels import fused_linear_logprobs, fused_linear_policy_loss, trajectory_rank_loss
from tests.kernels.inputs import draw_labels, draw_sequences, peaked
from tests.kernels.tolerance import fp32_rounding

ROWS, COLUMNS, WIDTH = 40, 23, 6
TERMS = {
    "policy": {},
    "KL": {"kl_weight": 0.1},
    "entropy": {"entropy_weight": 0.02},
    "all": {"kl_weight": 0.1, "entropy_weight": 0.02, "rank_weight": 0.3, "form": "logistic", "margin": 0.1},
}


def draw_head(dtype=torch.float64):
    shapes = {"hidden": (ROWS, WIDTH), "weight": (COLUMNS, WIDTH), "bias": (COLUMNS,)}
    return {name: torch.randn(shape).to(dtype).requires_grad_() for name, shape in shapes.items()}


def draw_actions(head, terms):
    """Tokens and log-probabilities about those of the head, so that ratios lie on both sides of the clip."""
    labels = draw_labels(torch.randn(ROWS, COLUMNS))
    logprobs = fused_linear_logprobs(**head, labels=labels, backend="reference")[0].detach().float()
    batch = {
        "labels": labels,
        "old_logprobs": logprobs + 0.3 * torch.randn(ROWS),
        "advantages": torch.randn(ROWS),
        "token_weights": torch.rand(ROWS),
        **terms,
    }
    if "kl_weight" in terms:
        batch["ref_logprobs"] = logprobs + 0.3 * torch.randn(ROWS)
    if "rank_weight" in terms:
        batch["steps"], batch["cu_seqlens"] = draw_sequences([12, 0, 17, 11])
    return batch


def loss_and_gradients(head, batch, **options):
    result = fused_linear_policy_loss(**head, **batch, **options)
    return [*result, *torch.autograd.grad(result.loss, head.values())]


def plain_loss(logits, batch, lowest, highest):
    """The formula of the docstring under autograd, by log_softmax."""
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    is_used = batch["labels"] >= 0
    weights = batch["token_weights"].double() * is_used / is_used.sum()
    logprob = log_p.gather(1, batch["labels"].clamp(min=0)[:, None]).squeeze(1)
    ratio, advantage = (logprob - batch["old_logprobs"]).exp(), batch["advantages"]
    loss = -torch.minimum(ratio * advantage, ratio.clamp(lowest, highest) * advantage)
    assert {True, False} == {*(ratio[is_used] < lowest).tolist()} == {*(ratio[is_used] > highest).tolist()}
    if "kl_weight" in batch:
        d = batch["ref_logprobs"] - logprob
        loss = loss + batch["kl_weight"] * (d.exp() - d - 1)
    loss = (weights * (loss - batch.get("entropy_weight", 0) * entropy)).sum()
    if "rank_weight" in batch:
        settings = {name: batch[name] for name in ("form", "margin")}
        ranks = trajectory_rank_loss(
            entropy, batch["steps"], batch["cu_seqlens"], **settings, temperature=0.7, backend="reference"
        )
        loss = loss + batch["rank_weight"] * ranks.sum() / 3  # the empty sequence has no pair
    return loss


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("max_chunk_rows", [None, 7, 1])
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
def test_loss_and_gradients_in_fp64(rng, backend, terms, max_chunk_rows):
    head = draw_head()
    batch = draw_actions(head, terms)
    exact = plain_loss(F.linear(*head.values()), batch, 0.9, 1.3)
    options = {"clip": (0.1, 0.3), "temperature": 0.7, "max_chunk_rows": max_chunk_rows, "backend": backend}
    ours = loss_and_gradients(head, batch, **options)
    expected = [exact, *torch.autograd.grad(exact, head.values())]
    for a, b in zip([ours[0], *ours[6:]], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    theirs = fused_linear_policy_loss(**head, **batch, **options | {"backend": "reference"})
    for a, b in zip(ours, theirs, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_chunk_rows", [None, 12])
def test_error_is_at_most_twice_that_of_the_naive_loss(rng, backend, dtype, max_chunk_rows):
    head = draw_head(dtype)
    batch = draw_actions(head, TERMS["all"])
    doubles = {name: x.detach().double().requires_grad_() for name, x in head.items()}
    exact = loss_and_gradients(doubles, batch, backend="reference")
    naive = loss_and_gradients(head, batch, backend="reference")
    ours = loss_and_gradients(head, batch, backend=backend, max_chunk_rows=max_chunk_rows)
    for o, n, e in zip(ours, naive, exact, strict=True):
        assert (o.double() - e).abs().max() <= 2 * (n.double() - e).abs().max() + 4 * fp32_rounding(e)


def test_gradcheck(rng):
    head = draw_head()
    batch = draw_actions(head, TERMS["all"])
    temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def loss(hidden, weight, bias, temperature):
        tensors = {"hidden": hidden, "weight": weight, "bias": bias, "temperature": temperature}
        return fused_linear_policy_loss(**tensors, **batch, max_chunk_rows=12, backend="torch").loss

    assert torch.autograd.gradcheck(loss, (*head.values(), temperature), atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -3.0])
def test_an_ignored_row_does_not_count_whatever_stands_in_it(rng, backend, value):
    head = draw_head(torch.float32)
    batch = draw_actions(head, TERMS["KL"])
    results = []
    for ignored in (value, 0.0):
        names = ("old_logprobs", "advantages", "ref_logprobs", "token_weights")
        changed = {name: batch[name].masked_fill(batch["labels"] < 0, ignored) for name in names}
        results.append(loss_and_gradients(head, batch | changed, backend=backend))
    for a, b in zip(*results, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_without_an_advantage_a_ratio_may_be_anything(rng, backend):
    head = draw_head(torch.float32)
    labels, nothing = torch.zeros(ROWS, dtype=torch.int64), torch.zeros(ROWS)
    batch = {"labels": labels, "old_logprobs": nothing - 500, "advantages": nothing}
    result = loss_and_gradients(head, batch, backend=backend)
    assert all(x.isfinite().all() for x in result) and all(x.abs().max() == 0 for x in result[6:])


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("old, other, advantage", [(-200.0, None, -1.0), (0.0, 100.0, 1.0)])
def test_a_ratio_beyond_fp32_is_bounded_and_has_no_gradient(rng, backend, old, other, advantage):
    head = draw_head(torch.float32)
    rows = torch.ones(ROWS)
    batch = {"labels": torch.zeros(ROWS, dtype=torch.int64), "old_logprobs": old * rows, "advantages": advantage * rows}
    if other is not None:
        batch |= {"ref_logprobs": other * rows, "kl_weight": 1.0, "advantages": 0 * rows}
    result = loss_and_gradients(head, batch, backend=backend)
    assert result[0] > 1e34 and all(x.isfinite().all() for x in result)
    assert all(x.abs().max() < 1 for x in result[6:])


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("max_chunk_rows", [None, 7])
def test_without_old_logprobs_every_ratio_is_one(rng, backend, max_chunk_rows):
    head = draw_head(torch.float32)
    batch = draw_actions(head, TERMS["policy"])
    logprobs, _ = fused_linear_logprobs(**head, labels=batch["labels"], backend=backend)
    options = {"max_chunk_rows": max_chunk_rows, "backend": backend}
    ours, theirs = (loss_and_gradients(head, batch | {"old_logprobs": x}, **options) for x in (None, logprobs.detach()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_without_a_clip_the_ratio_itself_counts(rng, backend):
    head = draw_head()
    batch = draw_actions(head, TERMS["policy"])
    result = fused_linear_policy_loss(**head, **batch, clip=[torch.inf, torch.inf], backend=backend)
    is_used = batch["labels"] >= 0
    gains = (result.logprobs - batch["old_logprobs"]).exp() * batch["advantages"] * batch["token_weights"]
    torch.testing.assert_close(result.loss, -gains[is_used].sum() / is_used.sum())


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_logprobs_at_a_temperature_of_soft_capped_logits(rng, backend):
    head, labels, tau, cap = draw_head(), torch.randint(COLUMNS, (ROWS,)), 0.5, 3.0
    logits = cap * torch.tanh(F.linear(*head.values()) / cap)
    exact = (logits / tau).log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    ours, _ = fused_linear_logprobs(**head, labels=labels, logit_scale=1 / tau, softcap=cap / tau, backend=backend)
    torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_frozen_head_gets_no_gradient_and_no_buffer(rng, monkeypatch, backend):
    head = draw_head(torch.float32)
    batch = draw_actions(head, TERMS["policy"])
    expected = loss_and_gradients(head, batch, backend=backend)[6]
    for name in ("weight", "bias"):
        head[name] = head[name].detach()
    for function in (
        lambda: fused_linear_policy_loss(**head, **batch, backend=backend).loss,
        lambda: sum(x.sum() for x in fused_linear_logprobs(**head, labels=batch["labels"], backend=backend)),
    ):
        loss = function()
        (gradient,) = torch.autograd.grad(loss, head["hidden"])
        assert gradient.shape == (ROWS, WIDTH)
        expected = expected if expected is None else torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_both_compile_to_one_graph(rng, backend):
    head = draw_head(torch.float32)
    batch = draw_actions(head, TERMS["all"])

    def step(hidden, weight, bias):
        result = fused_linear_policy_loss(hidden, weight, bias=bias, **batch, max_chunk_rows=12, backend=backend)
        logprobs, entropy = fused_linear_logprobs(
            hidden, weight, batch["labels"], bias=bias, max_chunk_rows=12, backend=backend
        )
        return result.loss + (logprobs * batch["advantages"]).sum() + entropy.square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    losses = [function(*head.values()) for function in (compiled, step)]
    for a, b in zip(*((x, *torch.autograd.grad(x, head.values())) for x in losses), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"clip": -0.1}, ValueError, "clip=-0.1: expected a number of at least 0"),
        ({"clip": (0.2, -1.0)}, ValueError, r"clip=\(0.2, -1.0\)"),
        ({"clip": [0.2, 0.3, 0.4]}, ValueError, r"clip=\[0.2, 0.3, 0.4\]: expected a number of at least 0, or two"),
        ({"clip": None}, ValueError, "clip=None"),
        ({"clip": torch.nan}, ValueError, "clip=nan"),
        ({"advantages": None}, TypeError, "advantages: expected a tensor of floating point, got None"),
        ({"kl_weight": 0.1}, ValueError, "kl_weight=0.1 without ref_logprobs"),
        ({"ref_logprobs": torch.zeros(ROWS)}, ValueError, "kl_weight=0.0 with ref_logprobs"),
        ({"entropy_weight": -1.0}, ValueError, "entropy_weight=-1.0"),
        ({"advantages": torch.zeros(3)}, ValueError, r"advantages: expected shape \(40,\), got \(3,\)"),
        ({"old_logprobs": torch.zeros(ROWS, requires_grad=True)}, ValueError, "old_logprobs: their gradient"),
        ({"advantages": torch.zeros(ROWS, dtype=torch.int64)}, TypeError, "advantages: expected a tensor of float"),
        ({"rank_weight": 1.0}, TypeError, "steps"),
    ],
)
def test_errors_name_the_argument(rng, changes, error, message):
    head = draw_head()
    with pytest.raises(error, match=message):
        fused_linear_policy_loss(**head, **draw_actions(head, {}) | changes)


@pytest.mark.parametrize("max_chunk_rows", [None, 7, 1])
@pytest.mark.parametrize("transform", [{}, {"logit_scale": 2.0, "softcap": 5.0}])
@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)])
def test_logprobs_take_any_upstream_gradient(rng, max_chunk_rows, transform, used):
    head, labels = draw_head(), draw_labels(torch.randn(ROWS, COLUMNS))
    upstream = torch.randn(2, ROWS, dtype=torch.float64)
    results = []
    for backend in ("torch", "reference"):
        outputs = fused_linear_logprobs(
            **head, labels=labels, max_chunk_rows=max_chunk_rows, backend=backend, **transform
        )
        loss = sum((x * up).sum() for x, up, is_used in zip(outputs, upstream, used, strict=True) if is_used)
        results.append([*outputs, *torch.autograd.grad(loss, head.values())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logprobs_round_at_most_twice_as_much_as_the_naive_ones(rng, backend, dtype):
    head, labels = draw_head(dtype), draw_labels(torch.randn(ROWS, COLUMNS))
    upstream = torch.randn(2, ROWS, dtype=torch.float64)

    def outputs_and_gradients(head, **options):
        outputs = fused_linear_logprobs(**head, labels=labels, **options)
        loss = sum((x * up.to(x.dtype)).sum() for x, up in zip(outputs, upstream, strict=True))
        return [*outputs, *torch.autograd.grad(loss, head.values())]

    doubles = {name: x.detach().double().requires_grad_() for name, x in head.items()}
    exact, naive = (outputs_and_gradients(x, backend="reference") for x in (doubles, head))
    ours = outputs_and_gradients(head, backend=backend, max_chunk_rows=12)
    for o, n, e in zip(ours, naive, exact, strict=True):
        assert (o.double() - e).abs().max() <= 2 * (n.double() - e).abs().max() + 4 * fp32_rounding(e)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_logprob_of_a_certain_token_keeps_its_digits(rng, backend):
    """log_softmax in fp32 gives 1.01e-6 or 9.5e-7 for 1e-6."""
    weight = peaked(1, 50).T.float()
    label = weight.argmax(0)
    logprob, _ = fused_linear_logprobs(torch.ones(1, 1), weight, label, backend=backend)
    exact = weight.double().squeeze(1).log_softmax(0)[label]
    torch.testing.assert_close(logprob.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("function", ["policy", "logprobs"])
def test_no_tensor_of_rows_times_vocabulary_is_ever_made(rng, function):
    head = draw_head(torch.float32)
    batch = draw_actions(head, TERMS["policy"])
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            result = operation(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))
            return result

    with Sizes():
        if function == "policy":
            loss = fused_linear_policy_loss(**head, **batch, max_chunk_rows=4, backend="torch").loss
        else:
            outputs = fused_linear_logprobs(**head, labels=batch["labels"], max_chunk_rows=4, backend="torch")
            loss = sum(x.sum() for x in outputs)
        loss.backward()
    assert max(sizes) == ROWS * WIDTH > 4 * COLUMNS
