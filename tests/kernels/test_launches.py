"""What a training step launches, counted on the CPU: kernels, and what PyTorch adds."""

from collections import Counter
from functools import partial

import pytest
import torch
from torch.autograd.profiler import profile

from tabom_kernels import arguments, cross_entropy_with_entropy, tabom_loss, unmask_statistics
from tests.gpu_emulator.driver import EmulatedLauncher
from tests.kernels.inputs import draw_labels, draw_sequences, gaussian

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the emulator")

LAUNCH_NOTHING = {"item", "_local_scalar_dense", "detach", "detach_", "lift_fresh", "promote_types", "to"}
VIEWS = {"alias", "as_strided", "expand", "flatten", "narrow", "select", "slice", "squeeze", "unsqueeze", "view"}
COUNTED_INSIDE = {
    "_to_copy",
    "clone",
    "diff",
    "full",
    "new_ones",
    "ones_like",
    "repeat_interleave",
    "stack",
    "zero_",
    "zeros",
}
"""Operations that call others, which are counted."""

LAUNCH_NOTHING |= VIEWS | COUNTED_INSIDE


@pytest.fixture
def count(monkeypatch):
    """A function that counts the launches of a call."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setattr(arguments, "values_are_checked", lambda tensor: False)  # as on a GPU
    launches = Counter()

    def count_only(launcher, *arguments):
        launches[launcher.source.fn.__name__.removesuffix("_kernel")] += 1

    monkeypatch.setattr(EmulatedLauncher, "__call__", count_only)

    def launches_of(call):
        launches.clear()
        with profile() as events:
            call()
        ops = ("aten::", "tabom_kernels::")  # eager calls pass the dispatcher by: there are none of ours
        names = (e.name.removeprefix("aten::") for e in events.function_events if e.name.startswith(ops))
        launches.update(name for name in names if "empty" not in name and name not in LAUNCH_NOTHING)
        launches["fill_"] -= launches["sum"]  # a CPU fills the result of a sum first, a GPU does not
        return dict(+launches)

    return launches_of


@pytest.mark.parametrize("settings", [{}, {"margin": 0.1, "temperature": 0.7, "num_tokens": 9, "num_sequences": 2.5}])
def test_the_whole_loss_is_five_kernels_and_a_few_launches_of_pytorch(rng, count, settings):
    """PyTorch's are the denominators, the weights of rows and sequences, and sums of a number a row."""
    logits = gaussian(12, 9).float().requires_grad_()
    batch = (draw_labels(logits), *draw_sequences([5, 7]))
    found = count(lambda: tabom_loss(logits, *batch, backend="triton", **settings).loss.backward())
    kernels = {"statistics": 1, "merge": 1, "pairs": 1 if settings else 2, "means": 1 if settings else 2, "gradient": 1}
    assert {name: found.pop(name) for name in kernels} == kernels
    assert sum(found.values()) <= (24 if settings else 32), found


def test_both_losses_of_a_row_are_three_launches(rng, count):
    logits, labels, upstream = gaussian(12, 9).float().requires_grad_(), torch.arange(-3, 9), list(torch.rand(2, 12))

    def step():
        torch.autograd.backward(cross_entropy_with_entropy(logits, labels, backend="triton"), upstream)

    assert count(step) == dict.fromkeys(("statistics", "merge", "gradient"), 1)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_token_is_two_launches(rng, count, temperature):
    logits, keys = gaussian(12, 9).float(), torch.arange(12)
    sample = partial(unmask_statistics, logits, temperature=temperature, generator=keys, backend="triton")
    assert count(sample) == dict.fromkeys(("unmask", "choose"), 1)
