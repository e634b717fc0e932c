"""What torch.compile and torch.export keep: one graph for all sizes of a batch and all settings."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

from tabom_kernels import (
    count_ordered_pairs,
    cross_entropy_with_entropy,
    fused_linear_tabom_loss,
    softmax_entropy,
    tabom_loss,
    trajectory_rank_loss,
    unmask_statistics,
)
from tests.kernels.inputs import draw_labels, draw_sequences, gaussian

COLUMNS, WIDTH = 11, 5
SETTINGS = {"form": "logistic", "backend": "torch"}


def rank_loss(logits, labels, steps, cu_seqlens, hidden, weight, setting):
    return trajectory_rank_loss(logits[:, 0], steps, cu_seqlens, margin=setting, temperature=setting, **SETTINGS)


def whole_loss(logits, labels, steps, cu_seqlens, hidden, weight, setting):
    options = {"margin": setting, "temperature": setting, "rank_weight": setting, "num_tokens": setting, **SETTINGS}
    return tabom_loss(logits, labels, steps, cu_seqlens, num_sequences=setting, **options).loss


def whole_loss_with_its_own_counts(logits, labels, steps, cu_seqlens, hidden, weight, setting):
    return tabom_loss(logits, labels, steps, cu_seqlens, token_weights=hidden[:, 0].detach(), **SETTINGS).loss


def fused_loss(logits, labels, steps, cu_seqlens, hidden, weight, setting):
    options = {"margin": setting, "temperature": setting, "rank_weight": setting, "num_tokens": setting, **SETTINGS}
    return fused_linear_tabom_loss(hidden, weight, labels, steps, cu_seqlens, num_sequences=setting, **options).loss


def fused_loss_with_its_own_counts(logits, labels, steps, cu_seqlens, hidden, weight, setting):
    return fused_linear_tabom_loss(hidden, weight, labels, steps, cu_seqlens, **SETTINGS).loss


def both_entropies(logits, labels, steps, cu_seqlens, hidden, weight, setting):
    ce, entropy = cross_entropy_with_entropy(logits, labels, backend="torch")
    return ce + entropy + softmax_entropy(logits, backend="torch")


def pairs(logits, labels, steps, cu_seqlens, hidden, weight, setting):
    return count_ordered_pairs(steps, cu_seqlens, backend="torch")


def greedy_step(logits, labels, steps, cu_seqlens, hidden, weight, setting):
    return unmask_statistics(logits, backend="torch").entropy


LOSSES = [rank_loss, whole_loss, fused_loss, both_entropies]
LOSSES += [whole_loss_with_its_own_counts, fused_loss_with_its_own_counts]
ALL = [*LOSSES, pairs, greedy_step]


def draw_inputs(sequences, rows_each=3):
    steps, cu_seqlens = draw_sequences([rows_each] * sequences)
    rows = len(steps)
    logits = gaussian(rows, COLUMNS).float()
    hidden, weight = torch.randn(rows, WIDTH), torch.randn(COLUMNS, WIDTH)
    return logits, draw_labels(logits), steps, cu_seqlens, hidden, weight


def value_and_gradients(function, inputs, setting):
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    value = function(*leaves, setting)
    if value.requires_grad:
        value.sum().backward()
    return [value.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("function", ALL)
def test_twenty_sizes_and_five_settings_take_two_compilations(rng, function):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for sequences in range(2, 22):
        inputs, setting = draw_inputs(sequences), (0.1, 0.25, 0.7, 1.3, 2.0)[sequences % 5]
        for ours, eager in zip(
            value_and_gradients(compiled, inputs, setting), value_and_gradients(function, inputs, setting), strict=True
        ):
            torch.testing.assert_close(ours, eager)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("function", ALL)
def test_rows_marked_as_dynamic_take_one_compilation(rng, function):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for sequences in (3, 4, 9):
        inputs = draw_inputs(sequences)
        for x in inputs[:-1]:
            torch._dynamo.mark_dynamic(x, 0)
        compiled(*inputs, 0.5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("function", ALL)
def test_export_with_dynamic_rows_and_sequences(rng, function):
    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return function(*inputs, 0.5)

    rows, offsets = Dim("rows", min=2), Dim("offsets", min=3)
    sizes = ({0: rows}, {0: rows}, {0: rows}, {0: offsets}, {0: rows}, None)
    exported = torch.export.export(Module(), draw_inputs(4), dynamic_shapes={"inputs": sizes})
    other = draw_inputs(7)
    torch.testing.assert_close(exported.module()(*other), function(*other, 0.5))
