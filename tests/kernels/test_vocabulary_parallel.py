"""Each rank has a slice of the vocabulary: the loss and gradients are those of the whole one."""

import itertools
import random

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DeviceMesh, DTensor, Replicate, Shard

from tabom_kernels import fused_linear_tabom_loss
from tabom_kernels.backends import torch as torch_backend
from tabom_kernels.ops.vocabulary_parallel import ShardedVocabulary, merge_slices
from tests.gpu_emulator.driver import install
from tests.kernels.inputs import VALUES, draw_labels, draw_sequences

COLUMNS, WIDTH, LENGTHS = 31, 8, [5, 0, 9, 2]


def merged(logits, labels, slices):
    """The statistics of rows from those of slices of their columns."""
    parts, first = [], 0
    for z in logits.tensor_split(slices, 1):
        parts.append(ShardedVocabulary(torch_backend, first, None).vocabulary_statistics(z, labels, -100))
        first += z.shape[1]
    return merge_slices(parts, labels, -100)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("slices", [1, 2, 3])
def test_slices_merge_to_the_whole_row(rng, values, slices):
    logits = values(40, 31)
    if slices > 1:
        logits[::3, :11] = -torch.inf  # without the first third, and in one row without anything else
    labels = torch.randint(31, (40,)).masked_fill(torch.rand(40) < 0.2, -100)  # some of them at -inf
    logits[5] = -torch.inf
    whole = torch_backend.vocabulary_statistics(logits, labels, -100)
    ours = merged(logits, labels, slices)
    assert ours.entropy[5].isnan()
    for a, b in zip(ours, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14, equal_nan=True)


def test_certain_rows_stay_exact_in_fp32(rng):
    logits, best = torch.randn(50, 31, dtype=torch.float64), torch.randint(31, (50,))
    logits.scatter_(1, best[:, None], torch.linspace(20, 45, 50, dtype=torch.float64)[:, None])
    logits = logits.float()
    ours, exact = merged(logits, best, 3), torch_backend.vocabulary_statistics(logits.double(), best, -100)
    assert exact.entropy.min() < 1e-15 and exact.cross_entropy.min() < 1e-15
    torch.testing.assert_close(ours.entropy.double(), exact.entropy, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.cross_entropy.double(), exact.cross_entropy, rtol=1e-5, atol=0)


def draw_problem(dtype):
    """Rows with labels in every slice; by the bias all of the first slices is -inf, and so are labels' neighbours."""
    hidden, weight = torch.randn(sum(LENGTHS), WIDTH).to(dtype), torch.randn(COLUMNS, WIDTH).to(dtype)
    bias = torch.randn(COLUMNS).masked_fill(torch.arange(COLUMNS) % 7 == 3, -torch.inf)
    if random.random() < 0.5:
        bias[:16] = -torch.inf
    labels = draw_labels(torch.zeros(len(hidden), COLUMNS) + bias)
    steps, cu_seqlens = draw_sequences(LENGTHS)
    return (hidden, weight, bias.to(dtype)), (labels, steps, cu_seqlens), torch.rand(len(hidden))


def loss_and_gradients(leaves, batch, **options):
    """What every rank has, and the gradients of hidden and temperature, and of weight and bias if they are trained."""
    tau_dtype = torch.promote_types(leaves[0].dtype, torch.float32)
    tau = torch.tensor(0.7, dtype=tau_dtype, requires_grad=True)
    options = {"rank_weight": 0.3, "margin": 0.1, "temperature": tau, "return_entropy": True, **options}
    loss, entropy = fused_linear_tabom_loss(leaves[0], leaves[1], *batch, bias=leaves[2], **options)
    wanted = [leaf for leaf in [*leaves, tau] if leaf.requires_grad]
    first = torch.autograd.grad(loss.loss * 3, wanted, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(loss.loss * 3, wanted, allow_unused=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None)
    return [*loss, entropy, *first]


def check_case(group, dtype, backend, is_frozen, as_dtensor, options):
    tensors, batch, token_weights = draw_problem(dtype)
    weights = {"token_weights": token_weights, "sequence_weights": 2 * torch.rand(len(LENGTHS))}
    options = {**weights, "backend": backend, **options}
    frozen = (False, is_frozen, is_frozen)

    def leaves_of(hidden, weight, bias):
        return [x.detach().clone().requires_grad_(not f) for x, f in zip((hidden, weight, bias), frozen, strict=True)]

    whole = loss_and_gradients(leaves_of(*tensors), batch, **options)
    hidden, weight, bias = tensors
    rank, ranks = group.rank(), group.size()
    if as_dtensor:
        mesh = DeviceMesh.from_group(group, "cpu")
        leaves = [DTensor.from_local(hidden, mesh, [Replicate()])]
        local = [x.tensor_split([16] if ranks == 2 else [11, 22])[rank] for x in (weight, bias)]
        leaves += [
            DTensor.from_local(x, mesh, [Shard(0)], shape=y.shape, stride=y.stride())
            for x, y in zip(local, (weight, bias), strict=True)
        ]
    else:
        cuts = [3] if ranks == 2 else [16, 17]  # any slices will do
        leaves = [hidden, *(x.tensor_split(cuts)[rank] for x in (weight, bias))]
        options["tp_group"] = group
    sharded = loss_and_gradients(leaves_of(*leaves), batch, **options)
    for i in (5, 6):  # weight and bias
        if not is_frozen:
            whole[i] = whole[i].tensor_split(([16] if ranks == 2 else [11, 22]) if as_dtensor else cuts)[rank]
    exact = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype]
    for name, (ours, theirs) in enumerate(zip(sharded, whole, strict=True)):
        if theirs is None:
            assert ours is None
            continue
        if isinstance(ours, DTensor):
            ours = ours.to_local()
        rounding = exact * theirs.float().abs().max().item() if ours.itemsize == 2 else exact
        torch.testing.assert_close(ours, theirs, rtol=exact, atol=rounding, msg=lambda m, n=name: f"{n}: {m}")


def on_each_rank(rank, ranks, store, seed):
    torch.set_default_device("cpu")
    install()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    torch.manual_seed(seed)
    random.seed(seed)
    group = dist.group.WORLD
    dtypes = (
        (torch.float64, "torch"),
        (torch.bfloat16, "torch"),
        (torch.float16, "torch"),
        (torch.float32, "triton"),
        (torch.bfloat16, "triton"),
    )
    settings = ({}, {"max_chunk_rows": 4, "fp32_logits": True}, {"rank_weight": 0.0, "form": "plackett_luce"})
    for (dtype, backend), is_frozen, options in itertools.product(dtypes, (False, True), settings):
        if backend == "torch" or options == {}:  # to emulate the kernels takes longest here
            check_case(group, dtype, backend, is_frozen, False, options)
    for is_frozen in (False, True):
        check_case(group, torch.float64, "torch", is_frozen, True, {})
    check_refusals(group)
    dist.destroy_process_group()


def check_refusals(group):
    """Every rank refuses alike, so that none waits for another."""
    tensors, batch, _ = draw_problem(torch.float32)
    mesh = DeviceMesh.from_group(group, "cpu")
    by_width = DTensor.from_local(tensors[1], mesh, [Shard(1)])
    by_rows = DTensor.from_local(tensors[1], mesh, [Shard(0)])
    too_few = DTensor.from_local(
        tensors[1][: group.rank() == 0], mesh, [Shard(0)], shape=torch.Size([1, WIDTH]), stride=(WIDTH, 1)
    )
    for weight, options, words in (
        (by_width, {}, "weight: expected a DTensor sharded"),
        (by_rows, {"tp_group": group}, "tp_group: expected None"),
        (too_few, {}, "weight: 1 rows on"),
        (tensors[1], {"tp_group": group, "backend": "reference"}, "backend='reference'"),
    ):
        with pytest.raises(ValueError, match=words):
            fused_linear_tabom_loss(tensors[0], weight, *batch, **options)
    shards = DTensor.from_local(tensors[0], mesh, [Shard(0)])
    with pytest.raises(ValueError, match="hidden: expected the same on every rank"):
        fused_linear_tabom_loss(shards, DTensor.from_local(tensors[1], mesh, [Shard(0)]), *batch)
    labels = torch.full_like(batch[0], group.size() * COLUMNS)
    with pytest.raises(ValueError, match="labels: "):
        fused_linear_tabom_loss(tensors[0], tensors[1], labels, *batch[1:], tp_group=group)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_with_slices_have_the_loss_and_gradients_of_the_whole(seed, tmp_path, ranks):
    arguments = (ranks, tmp_path / "store", seed)
    torch.multiprocessing.start_processes(on_each_rank, arguments, ranks, start_method="spawn")
