"""The benchmarks run, and the compiler's figures of the kernels are the committed ones."""

import os
import re
import subprocess
import sys

import pytest
import torch

from benchmarks import kernels
from benchmarks.measure import Contender, peak_memory_of, summary, time_interleaved

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def static_table() -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.static"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_the_committed_static_figures_are_those_of_the_code(static_table):
    with open("benchmarks/results/static.md") as file:
        committed = file.read()
    if committed.splitlines()[0] != static_table.splitlines()[0]:
        pytest.skip(f"the committed table is of {committed.splitlines()[0]}")
    assert static_table == committed, "python -m benchmarks.static > benchmarks/results/static.md"


def test_the_hot_path_compiles_as_it_must(static_table):
    """No spills anywhere; 128-bit loads and stores and one ex2 a logit where the vocabulary is read."""
    heads, _, *rows = [[cell.strip() for cell in re.split(r"\|", line)[1:-1]] for line in static_table.splitlines()[2:]]
    figures = [dict(zip(heads, row, strict=True)) for row in rows]
    assert {row["architecture"] for row in figures} == {"sm_80", "sm_90", "sm_100"}
    assert {"statistics", "gradient", "unmask greedy", "pairs logistic"} <= {row["kernel"] for row in figures}
    for row in figures:
        assert row["spills"] == "0", row
        assert int(row["shared bytes"]) <= 4096, row
        if row["wide loads"]:
            assert (row["wide loads"], row["wide stores"] or "1.00") == ("1.00", "1.00"), row
            assert float(row["ex2 per element"]) <= 1.01, row


def test_every_kernel_benchmark_runs(capsys):
    records = kernels.measure_all(CPU, [(32, 50)], [[4, 4]])
    assert {record["op"] for record in records} == {"statistics", "gradient", "whole_loss", "sampling", "ranking"}
    assert all(record["seconds"]["low"] <= record["seconds"]["median"] for record in records)
    kernels.print_table(records, 1e9)
    assert "of copy bandwidth" in capsys.readouterr().out


def test_contenders_take_turns():
    order = []
    contenders = [Contender(name, lambda n=name: order.append(n)) for name in "ab"]
    assert set(time_interleaved(contenders, CPU, rounds=2)) == {"a", "b"}
    assert order == ["a", "b", "a", "b", "a", "b"]  # the first round warms up


def test_summary_is_the_median_and_its_spread():
    assert summary([float(x) for x in range(11)]) == (5, 1, 9)


def test_peak_memory_counts_what_is_alive_at_once():
    def call():
        torch.empty(1000, dtype=torch.float64)
        first = torch.empty(2000, dtype=torch.float64)
        return first, torch.empty(3000, dtype=torch.float64)

    assert 5000 * 8 <= peak_memory_of(call, CPU) < 5100 * 8
