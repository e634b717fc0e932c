"""Small problems on one thread of a CPU, in fp32, forward and backward: ours beside plain PyTorch, also compiled.

    python -m benchmarks.small [--compiled]

A small problem is bound by the number of PyTorch calls, not by arithmetic, so this benchmark shows what the closed
forms cost beside a loss that one writes in ten lines. Every figure is a ratio, the peer's time over ours, of two calls
that ran one after the other; the table gives the median ratio and its 10th to 90th percentile. All contenders are first
checked to give the same loss and gradients. Writes benchmarks/results/small-cpu.json.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.tools.measure import environment, result_name, summary, write_json
from tabom_kernels import fused_linear_cross_entropy, fused_linear_tabom_loss, trajectory_rank_loss

CPU = torch.device("cpu")
MARGIN = 0.1


class Case(NamedTuple):
    """A loss by ours and by its peers; each call returns the loss and its gradients."""

    name: str
    contenders: dict[str, Callable[[], list[Tensor]]]


def plain_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of a linear layer."""
    return F.cross_entropy(F.linear(hidden, weight), labels)


def plain_loss(hidden: Tensor, weight: Tensor, labels: Tensor, steps: Tensor) -> Tensor:
    """Cross-entropy plus hinge ranking, with one pass over the log-probabilities; steps (B, T)."""
    log_p = F.linear(hidden, weight).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return F.nll_loss(log_p, labels) + dense_rank_loss(entropy.view(steps.shape), steps).mean()


def dense_rank_loss(entropy: Tensor, steps: Tensor) -> Tensor:
    """(B,) hinge rank loss of (B, T) entropies, all pairs of a sequence in one tensor."""
    is_pair = steps[:, :, None] < steps[:, None, :]
    loss = (entropy[:, :, None] - entropy[:, None, :] + MARGIN).relu()
    return (loss * is_pair).sum((1, 2)) / is_pair.sum((1, 2)).clamp(min=1)


def dense_logistic_loss(entropy: Tensor, steps: Tensor) -> Tensor:
    """The same with the logistic form, whose margin is 0."""
    is_pair = steps[:, :, None] < steps[:, None, :]
    loss = F.softplus(entropy[:, :, None] - entropy[:, None, :])
    return (loss * is_pair).sum((1, 2)) / is_pair.sum((1, 2)).clamp(min=1)


def head_case(rows: int, columns: int, width: int, sequences: int, has_ranking: bool) -> Case:
    """The fused linear loss with a trained head."""
    hidden, weight = torch.randn(rows, width), torch.randn(columns, width) * width**-0.5
    labels = torch.randint(columns, (rows,))
    steps = torch.rand(sequences, rows // sequences).argsort(1)
    cu_seqlens = torch.arange(0, rows + 1, rows // sequences, dtype=torch.int32)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    peer, inputs = (plain_loss, (*leaves, labels, steps)) if has_ranking else (plain_cross_entropy, (*leaves, labels))

    def ours() -> Tensor:
        if not has_ranking:
            return fused_linear_cross_entropy(*leaves, labels)
        options = {"form": "hinge", "margin": MARGIN}
        return fused_linear_tabom_loss(*leaves, labels, steps.flatten(), cu_seqlens, **options).loss

    name = f"{rows} x {columns} x {width}, {'hinge ranking' if has_ranking else 'cross-entropy'}"
    return make_case(name, leaves, ours, lambda function: function(*inputs), peer)


def rank_case(sequences: int, length: int, form: str) -> Case:
    """The rank loss of entropies."""
    entropy, steps = torch.rand(sequences, length).requires_grad_(), torch.rand(sequences, length).argsort(1)
    cu_seqlens = torch.arange(0, sequences * length + 1, length, dtype=torch.int32)
    flat_steps = steps.flatten()
    margin = MARGIN if form == "hinge" else 0.0

    def ours() -> Tensor:
        return trajectory_rank_loss(entropy.view(-1), flat_steps, cu_seqlens, form=form, margin=margin).sum()

    peer = dense_rank_loss if form == "hinge" else dense_logistic_loss
    name = f"{form} rank loss, {sequences} x {length}"
    return make_case(name, [entropy], ours, lambda function: function(entropy, steps).sum(), peer)


def make_case(
    name: str, leaves: list[Tensor], ours: Callable[[], Tensor], call: Callable[[Callable], Tensor], peer: Callable
) -> Case:
    """Ours, the peer, and the peer compiled."""
    compiled = torch.compile(peer)

    def step(loss: Callable[[], Tensor]) -> Callable[[], list[Tensor]]:
        def loss_and_gradients() -> list[Tensor]:
            value = loss()
            return [value.detach(), *torch.autograd.grad(value, leaves)]

        return loss_and_gradients

    contenders = {"ours": ours, "plain": lambda: call(peer), "compiled": lambda: call(compiled)}
    return Case(name, {who: step(loss) for who, loss in contenders.items()})


CASES: dict[str, Callable[[], Case]] = {
    "lab": lambda: head_case(2048, 45, 128, 8, False),
    "lab, ranking": lambda: head_case(2048, 45, 128, 8, True),
    "two rows": lambda: head_case(2, 45, 128, 1, False),
    "two rows, ranking": lambda: head_case(2, 45, 128, 1, True),
    "rank loss, long": lambda: rank_case(8, 256, "logistic"),
    "rank loss, long, hinge": lambda: rank_case(8, 256, "hinge"),
    "rank loss, short": lambda: rank_case(200, 20, "logistic"),
    "rank loss, short, hinge": lambda: rank_case(200, 20, "hinge"),
    "Dream": lambda: head_case(64, 152064, 128, 4, False),
    "Dream, ranking": lambda: head_case(64, 152064, 128, 4, True),
}


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    """The ratios of each peer's time to ours, after a check that their results are the same.

    Raises:
        AssertionError: a peer computes something else.
    """
    results = {name: call() for name, call in case.contenders.items()}
    for result in results.values():
        for a, b in zip(result, results["ours"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    ratios: dict[str, list[float]] = {name: [] for name in case.contenders if name != "ours"}
    calls_at_once = calls_of_a_turn(case.contenders["plain"])
    milliseconds = []
    for _ in range(rounds):
        own = seconds_of(case.contenders["ours"], calls_at_once)
        milliseconds.append(1e3 * own)
        for name, found in ratios.items():
            found.append(seconds_of(case.contenders[name], calls_at_once) / own)
    return [
        {
            "case": case.name,
            "peer": name,
            "ratio": summary(found)._asdict(),
            "ours_milliseconds": summary(milliseconds)._asdict(),
        }
        for name, found in ratios.items()
    ]


def calls_of_a_turn(call: Callable[[], Any]) -> int:
    """As many calls as take about 10 ms, so that one turn is longer than the clock's and the scheduler's noise."""
    call()
    return max(1, round(0.01 / seconds_of(call, 1)))


def seconds_of(call: Callable[[], Any], calls: int) -> float:
    """Processor time of one call, as other processes may be running."""
    start = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - start) / calls


def ratios_table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: the peer's time over ours."""
    lines = ["| | ours, ms | peer | its time over ours |", "| --- | ---: | --- | ---: |"]
    for record in records:
        ratio = "{median:.2f} ({low:.2f} to {high:.2f})".format(**record["ratio"])
        milliseconds = record["ours_milliseconds"]["median"]
        lines.append(f"| {record['case']} | {milliseconds:.3g} | {record['peer']} | {ratio} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every case, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--only", nargs="+", choices=list(CASES), default=list(CASES), help="print these, write nothing"
    )
    parser.add_argument("--compiled", action="store_true", help="also the peers under torch.compile")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    records = []
    for name in options.only:
        torch.manual_seed(0)
        torch.compiler.reset()
        case = CASES[name]()
        if not options.compiled:
            del case.contenders["compiled"]
        records += measure(case, options.rounds)
    print(ratios_table(records))
    if options.only == list(CASES):
        print(f"wrote {write_json(result_name('small', CPU), environment(CPU) | {'figures': records})}")


if __name__ == "__main__":
    main()
