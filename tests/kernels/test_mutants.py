"""Compiled kernels that are broken on purpose: the emulator reports each, so it would report such a kernel of ours."""

import re

import numpy as np
import pytest
import torch

from tabom_kernels import cross_entropy_with_entropy, trajectory_rank_loss, unmask_statistics
from tabom_kernels.backends.triton import vocabulary_statistics
from tests.gpu_emulator.driver import REWRITES
from tests.gpu_emulator.errors import Defect
from tests.kernels.inputs import gaussian

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="rewrites what the emulator runs")


@pytest.fixture
def mutate():
    """Replaces a pattern in the PTX of one kernel, at its first so many places, which must exist."""

    def start(kernel, pattern, replacement, count=0):
        def rewrite(text):
            if f".entry {kernel}(" not in text:
                return text
            changed, found = re.subn(pattern, replacement, text, count=count)
            assert found, f"{kernel} has no {pattern}"
            return changed

        REWRITES.append(rewrite)

    yield start
    REWRITES.clear()


def losses(logits, inplace_backward=False):
    """Both losses of each row and the gradient, as users call them. The labels are the last columns."""
    labels = logits.shape[1] - 1 - torch.arange(len(logits))
    outputs = cross_entropy_with_entropy(
        logits.requires_grad_(), labels, inplace_backward=inplace_backward, backend="triton"
    )
    return outputs, torch.autograd.grad(sum(x.sum() for x in outputs), logits)


def losses_in_place(logits):
    return losses(logits, inplace_backward=True)


def tokens(logits):
    return unmask_statistics(logits, temperature=0.8, top_p=0.9, generator=torch.arange(len(logits)), backend="triton")


def ranking(logits, form="logistic"):
    return trajectory_rank_loss(logits[:, 0], torch.arange(2), torch.tensor([0, 2]), form=form, backend="triton")


@pytest.mark.parametrize(
    "kernel, call",
    [
        ("statistics_kernel", losses),
        ("gradient_kernel", losses_in_place),
        ("unmask_kernel", tokens),
        ("choose_kernel", tokens),
        ("masses_kernel", tokens),
        ("narrow_kernel", tokens),
    ],
)
def test_without_its_barriers_a_kernel_races(rng, mutate, kernel, call):
    call(gaussian(2, 1000).float())
    mutate(kernel, r"bar\.sync\s+0;", "")
    with pytest.raises(Defect, match=r"race|different values|uninitialised"):
        call(gaussian(2, 1000).float())


@pytest.mark.parametrize(
    "kernel, call",
    [
        ("statistics_kernel", losses),
        ("gradient_kernel", losses_in_place),
        ("unmask_kernel", tokens),
        ("masses_kernel", tokens),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_that_is_a_column_too_wide_leaves_the_tensor(rng, mutate, kernel, call, dtype):
    """Or by the eight columns that a thread loads at once: their mask compares its index with 125."""
    mutate(
        kernel, r"(setp\.(?:lt|gt)\.[su]32\s.*?, )(1000|999|125|124);", lambda found: f"{found[1]}{int(found[2]) + 1};"
    )
    with pytest.raises(Defect, match="access out of bounds"):
        call(gaussian(2, 1000).to(dtype))


def test_a_label_that_is_no_column_reads_nothing(rng, mutate):
    logits, labels = gaussian(2, 1000).float(), torch.tensor([0, 1000])
    assert vocabulary_statistics(logits, labels, -100).cross_entropy.isnan().tolist() == [False, True]
    mutate("merge_kernel", r"(setp\.lt\.u64\s.*?, )1000;", r"\g<1>1001;")
    with pytest.raises(Defect, match="access out of bounds"):
        vocabulary_statistics(logits, labels, -100)


@pytest.mark.parametrize(
    "kernel, call",
    [
        ("statistics_kernel", losses),
        ("merge_kernel", losses),
        ("gradient_kernel", losses_in_place),
        ("unmask_kernel", tokens),
        ("choose_kernel", tokens),
        ("masses_kernel", tokens),
    ],
)
def test_a_row_offset_of_32_bits_leaves_the_rows(rng, mutate, kernel, call):
    """Rows 2^30 elements apart: the third is 2^31 elements away, and 2^31 + 2^4 has another sign in 32 bits."""
    stride = 2**30 + 8
    storage = torch.from_numpy(np.empty(2 * stride + 100, np.int16)).view(torch.bfloat16)
    logits = storage.as_strided((3, 100), (stride, 1)).copy_(gaussian(3, 100))
    mutate(kernel, r"(mul\.lo\.s64\s+(%rd\d+),.*?;)", r"\1 cvt.s64.s32 \2, \2;", count=1)
    with pytest.raises(Defect, match="access out of bounds"):
        call(logits)


@pytest.mark.parametrize(
    "kernel, call, row_stride",
    [
        ("statistics_kernel", losses, 2),
        ("merge_kernel", losses, 7),
        ("gradient_kernel", losses, 8),
        ("unmask_kernel", tokens, 7),
        ("choose_kernel", tokens, 12),
        ("masses_kernel", tokens, 5),
    ],
)
def test_strides_in_the_wrong_order_leave_the_tensor(rng, mutate, kernel, call, row_stride):
    """The column stride is the parameter behind that of the rows."""
    logits = gaussian(3, 40).float().repeat(1, 3)[:, ::3]
    both = 2 * row_stride + 1
    parameters = rf"{kernel}_param_({row_stride}|{row_stride + 1})\]"
    mutate(kernel, parameters, lambda found: f"{kernel}_param_{both - int(found[1])}]")
    with pytest.raises(Defect, match="access out of bounds"):
        call(logits)


@pytest.mark.parametrize(
    "kernel, call",
    [
        ("statistics_kernel", losses),
        ("unmask_kernel", tokens),
        ("masses_kernel", tokens),
        ("pairs_kernel", ranking),
        ("turns_kernel", lambda z: ranking(z, "plackett_luce")),
    ],
)
def test_a_partial_result_that_is_not_written_is_read_as_uninitialised(rng, mutate, kernel, call):
    mutate(kernel, r"@%p\d+ st\.global\.b32 .*?;", "", count=1)
    with pytest.raises(Defect, match="read of uninitialised memory"):
        call(gaussian(2, 1000).float())
