"""The benchmarks run, and the compiler's figures of the kernels are the committed ones."""

import copy
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from benchmarks import (
    alone,
    blocks,
    busy,
    caches,
    emulated,
    engine,
    heads,
    kernels,
    loss,
    policy,
    sampler,
    scaling,
    small,
    static,
    trained_head,
    trainer,
)
from benchmarks.tools import pictures
from benchmarks.tools.measure import Contender, peak_memory_of, summary, time_interleaved
from tabom.lab.dry_run import random_model
from tabom.sampling.config import SamplerConfig
from tabom.training.logit_transforms import LOGIT_FIELDS, LogitFields

CPU = torch.device("cpu")


NEWEST_TRITON = Path(".triton-newest")

INSTRUCTIONS_A_LOGIT = {
    "statistics": 8.8,
    "gradient": 8.9,
    "unmask greedy": 11.8,
    "unmask sampled": 17.2,
    "masses top-k": 52,
    "masses top-p": 85,
}
"""At most, in bf16, on every architecture and version of Triton, for a chunk with nothing special in it."""


@pytest.fixture(scope="module", params=["pinned", "newest"])
def compile_kernels(request):
    """Runs benchmarks.static with a version of Triton, and returns what it prints."""
    environment = dict(os.environ)
    if request.param == "newest":
        if not NEWEST_TRITON.exists():
            pytest.skip(f"no other Triton in {NEWEST_TRITON}: make triton-newest")
        environment["PYTHONPATH"] = os.pathsep.join([str(NEWEST_TRITON), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "benchmarks.static"]

    def run(*arguments):
        result = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


@pytest.fixture(scope="module")
def static_table(compile_kernels) -> str:
    return compile_kernels()


def test_the_smallest_batch_compiles(compile_kernels):
    """A size of 1 is a constant to the compiler instead of an argument."""
    compile_kernels("--smallest")


def test_the_committed_static_figures_are_those_of_the_code(static_table):
    with open("benchmarks/results/static.md") as file:
        committed = file.read()
    if committed.splitlines()[0] != static_table.splitlines()[0]:
        pytest.skip(f"the committed table is of {committed.splitlines()[0]}")
    assert static_table == committed, "python -m benchmarks.static > benchmarks/results/static.md"


def test_the_hot_path_compiles_as_it_must(static_table):
    """No spills anywhere; where the vocabulary is read, 128-bit loads and stores, one ex2 a logit and distribution."""
    heads, _, *rows = [[cell.strip() for cell in re.split(r"\|", line)[1:-1]] for line in static_table.splitlines()[2:]]
    figures = [dict(zip(heads, row, strict=True)) for row in rows]
    assert {row["architecture"] for row in figures} == {"sm_80", "sm_90", "sm_100", "sm_120"}
    assert {*INSTRUCTIONS_A_LOGIT, "pairs logistic"} <= {row["kernel"] for row in figures}
    for row in figures:
        assert row["spills"] == "0", row
        assert int(row["shared bytes"]) <= 4096, row
        if row["kernel"] in INSTRUCTIONS_A_LOGIT:
            training = row["kernel"] in ("statistics", "gradient")
            exponentials = 2.1 if row["kernel"] == "unmask sampled" else 1.3
            assert row["wide loads"] == "1.00" and row["narrow stores"] in ("", "0"), row
            assert float(row["ex2 per element"]) < exponentials, row
            assert not training or int(row["registers"]) <= 128, row  # four programs on a multiprocessor
            if row["dtype"] == "bfloat16":
                assert float(row["per element"]) <= INSTRUCTIONS_A_LOGIT[row["kernel"]], row


SASS = """
.text.kernel:
        /*0000*/              @!P0 BRA P1, `(.L_x_1)      ?trans5;
        /*0010*/                   LDG.E.64 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P2 BRA `(.L_x_0) ;
        /*0030*/                   FADD R4, R4, R4 ;
        /*0040*/                   FADD R4, R4, R4 ;
.L_x_0:
        /*0050*/              @!P3 EXIT ;
        /*0060*/                   MUFU.EX2 R4, R4 ;
.L_x_1:
        /*0070*/                   LDG.E.U16 R6, desc[UR4][R2.64] ;
        /*0080*/                   EXIT ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_2);
        /*00a0*/                   NOP;
"""


@pytest.mark.parametrize(
    "needed, way",
    [(2, "BRA LDG.E.U16 EXIT"), (8, "BRA LDG.E.64 BRA EXIT"), (10, "BRA LDG.E.64 BRA EXIT MUFU.EX2 LDG.E.U16 EXIT")],
)
def test_instructions_are_those_of_the_shortest_way_that_loads_enough(needed, way):
    code = static.read_code(SASS)
    assert len(code) == 10
    assert static.shortest_way(code, needed) == Counter(way.split())


def test_the_counts_of_the_emulator_in_the_notes_are_what_the_json_says():
    result = json.loads(Path("benchmarks/results/emulated.json").read_text())
    assert emulated.counts_table(result["figures"]) in Path("benchmarks/NOTES.md").read_text()
    counts = {figure["op"]: figure for figure in result["figures"] if figure["architecture"] == "sm_90"}
    ours, trl = ("statistics", "gradient"), ("TRL, log-probability and entropy", "TRL, their gradient")
    words = [" and ".join(f"{counts[op]['instructions']:.1f}" for op in ops) for ops in (ours, trl)]
    for document in ("README.md", "docs/evidence.md"):
        claim = f"{words[0]} instructions a logit for statistics and gradient, TRL's {words[1]}"
        assert claim in Path(document).read_text()
    logistic, hinge = (f["instructions"] for f in result["pairs"] if f["architecture"] == "sm_90")
    claim = f"A logistic pair costs {logistic:.1f} instructions and a hinge {hinge:.1f}"
    assert claim in Path("benchmarks/NOTES.md").read_text()


def test_the_pairs_of_a_sequence_are_counted_for_every_architecture(monkeypatch):
    monkeypatch.setattr(emulated.SETTINGS, "architecture", emulated.SETTINGS.architecture)  # restored afterwards
    records = emulated.measure_pairs(64)
    counts = {(record["architecture"], record["form"]): record["instructions"] for record in records}
    assert {architecture for architecture, _ in counts} == {"sm_80", "sm_90", "sm_100"}
    for architecture, _ in counts:
        assert counts[architecture, "logistic"] > counts[architecture, "hinge"] > 1


def test_the_time_of_the_host_needs_no_gpu():
    command = [sys.executable, "-m", "benchmarks.host", "--rounds", "2"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert len(re.findall(r"^.+: \d+ µs \(\d+ to \d+\)$", out, re.MULTILINE)) == 5


def test_every_kernel_benchmark_runs(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "time_interleaved", partial(time_interleaved, rounds=2))
    records = kernels.measure_ranking(CPU, [4, 4], peers=True)
    for op in kernels.OPS:
        records += kernels.measure_op(op, CPU, 32, 1024, peers=True)  # with fewer, Liger's kernel has a race
    assert {record["op"] for record in records} == {
        "statistics",
        "gradient",
        "greedy",
        "whole_loss",
        "drawn",
        "ranking",
    }
    assert all(record["seconds"]["low"] <= record["seconds"]["median"] for record in records)
    kernels.print_table(records, 1e9)
    assert "of copy bandwidth" in capsys.readouterr().out


@pytest.fixture(scope="module")
def tiny_dream():
    torch.manual_seed(0)
    diffusion_model = random_model("Dream-org/Dream-v0-Instruct-7B", "tiny", torch.float32, None, CPU)
    diffusion_model.model.eval()
    with torch.no_grad():
        diffusion_model.model.lm_head.weight.mul_(20)
    return diffusion_model


def test_every_way_of_computing_the_loss_agrees_and_is_drawn(capsys):
    """The benchmark itself raises when a loss or gradient is not that of the reference."""
    torch.manual_seed(0)  # as the benchmark does: on problems so small a peer's rounding depends on the draw
    loss.add_peers(CPU)
    names = [name for name in loss.LOSSES if name != "torch.compile"] + list(loss.CROSS_ENTROPY_ALONE)
    assert {"Liger CE + entropy", "TRL CE + entropy"} <= set(names)
    shapes = [loss.Shape(sequences, 8, 4, 16, 60) for sequences in (2, 3)]
    records = [record for shape in shapes for record in loss.measure(shape, CPU, 2, 2**40, names)]
    assert {record["contender"] for record in records} == {*names, "two matmuls"}
    loss.print_table(records, matmul_rate=1e9)
    assert "less memory" in capsys.readouterr().out
    result = {"device": "d", "figures": [record | {"sweep": "sequences"} for record in records]}
    for draw in (pictures.draw_loss, pictures.draw_scaling):
        figure = Figure()
        draw(result, figure)
        lines = figure.axes[0].get_lines()
        assert [line.get_label() for line in lines] == list(pictures.LOOKS)


def test_a_peer_that_disagrees_is_not_timed(monkeypatch):
    monkeypatch.setitem(loss.LOSSES, "wrong", lambda problem: 1.1 * loss.fused_loss(problem))
    with pytest.raises(AssertionError, match="wrong"):
        loss.measure(loss.Shape(2, 8, 4, 16, 60), CPU, 2, 2**40, ["wrong"])


def test_the_trained_head_is_measured_and_the_notes_say_what_the_json_says(monkeypatch):
    cases = [trained_head.Case(8, torch.float32, 2), trained_head.Case(8, torch.float16, 0)]
    records = [record for case in cases for record in trained_head.measure(case, CPU, 60, 16)]
    assert [record["contender"] for record in records] == ["three matmuls", "ours", "naive", "TRL's op"] * 2
    assert trained_head.costs_table(records).count("not timed") == 4
    figures = json.loads(Path("benchmarks/results/trained-head-cpu.json").read_text())["figures"]
    assert trained_head.costs_table(figures) in Path("benchmarks/NOTES.md").read_text()
    ours = [f["peak_bytes"] / f["least_bytes"] for f in figures if f["contender"] == "ours"]
    assert len(ours) == 4 and max(ours) < 1.1, "else docs/loss.md says too much"
    monkeypatch.setitem(trained_head.LOSSES, "wrong", lambda problem: 1.1 * trained_head.trl_loss(problem))
    with pytest.raises(AssertionError, match="wrong"):
        trained_head.measure(cases[0], CPU, 60, 16)


def test_every_policy_loss_is_measured_and_one_that_disagrees_is_not():
    torch.manual_seed(0)
    rollouts = policy.draw_rollouts(2, 12, 16, 60, CPU)
    contenders = {name: loss for name, loss in policy.losses().items() if name != policy.COMPILED}
    records = policy.measure(rollouts, contenders, CPU, rounds=2)
    assert policy.times_table(records).count("24 |") == len(contenders) == 5
    contenders["wrong"] = lambda rollouts: 1.1 * policy.ours(rollouts)
    with pytest.raises(AssertionError, match="wrong"):
        policy.measure(rollouts, contenders, CPU, rounds=2)
    figures = json.loads(Path("benchmarks/results/policy-cpu.json").read_text())["figures"]
    assert policy.times_table(figures) in Path("benchmarks/NOTES.md").read_text()


def test_small_problems_are_measured_and_the_notes_say_what_the_json_says():
    """The results of ours and of plain PyTorch are compared before they are timed."""
    case = small.head_case(6, 11, 4, 2, True)
    del case.contenders["compiled"]
    [record] = small.measure(case, rounds=2)
    assert record["peer"] == "plain" and record["ratio"]["low"] <= record["ratio"]["median"]
    case.contenders["plain"] = lambda: [1.1 * x for x in case.contenders["ours"]()]
    with pytest.raises(AssertionError, match="not close"):
        small.measure(case, rounds=2)
    figures = json.loads(Path("benchmarks/results/small-cpu.json").read_text())["figures"]
    assert small.ratios_table(figures) in Path("benchmarks/NOTES.md").read_text()


def test_scaling_varies_one_quantity_at_a_time():
    for on_gpu in (False, True):
        for quantity, shapes in scaling.sweeps(128, 16, 512, on_gpu).items():
            others = {shape._replace(**{quantity: 0}) for shape in shapes}
            assert len(others) == 1 and len({getattr(shape, quantity) for shape in shapes}) == len(shapes) > 3


def test_two_processes_are_busy_at_once(capsys):
    records = busy.measure(loss.Shape(2, 8, 4, 16, 60), turns=2, seconds=0.01)
    assert [record["mode"] for record in records] == ["alone", "busy"] * 5
    assert all(0 < record["seconds"]["fastest"] <= record["seconds"]["low"] for record in records)
    busy.print_table(records)
    assert "fused loss" in capsys.readouterr().out


def test_the_sampler_benchmark_runs_and_its_loops_agree(tiny_dream):
    prompts = [[5, 6, 7], [8, 9, 10]]
    records = sampler.measure("tiny", tiny_dream, prompts, length=8, steps=4)
    assert [record["loop"] for record in records] == ["ours", "straightforward"] * 2
    assert all(0 < record["shares"]["head"] < 1 for record in records[::2])


@pytest.fixture
def few_asked(monkeypatch):
    """Short prompts whose answers end where they are told to."""
    asked = [engine.Asked([5] * (6 + 2 * i), end) for i, end in enumerate((3, 12, 8, 15))]
    monkeypatch.setattr(engine, "LENGTH", 16)
    monkeypatch.setattr(engine, "BLOCK", 8)
    monkeypatch.setattr(engine, "asked_of", lambda count, spread: asked[:count])
    return asked


def test_the_engine_benchmark_ends_answers_where_it_says_and_counts(tiny_dream, few_asked):
    before = copy.deepcopy(tiny_dream.model.state_dict())
    contenders = [engine.PLAIN, *engine.CACHES, *engine.PEERS]
    records = engine.measure("tiny", tiny_dream, contenders, 4, "wide", batch_size=2)
    assert all(torch.equal(value, before[name]) for name, value in tiny_dream.model.state_dict().items())
    plain, exact, *_caches, dllm, dream = records
    assert plain["answer_tokens"] == 3 + 12 + 8 + 15 <= exact["tokens_decided"] <= 8 + 16 + 8 + 16
    assert exact["fewer"] > plain["fewer"] == 1 > dllm["fewer"] == dream["fewer"]
    assert dream["positions"] == (2 * (8 + 16) + 2 * (12 + 16)) * 16
    assert exact["equal_tokens"] == exact["order_correlation"] == 1
    assert all(record["peak_bytes"] > 0 for record in records)
    assert engine.costs_table(records).count("Dream's loop") == 1


def test_the_arithmetic_of_fixed_batches_is_what_the_plain_loop_counts(tiny_dream, few_asked):
    config = SamplerConfig(max_new_tokens=16, block_length=8, policy="confidence", stop_early=True)
    with engine.answers_that_end(tiny_dream) as ends:
        plain = engine.run_plain(tiny_dream, ends, few_asked, config, 2, None)
        exact = engine.run_engine(tiny_dream, ends, few_asked, config, 2, None)
    steps = [max(completion.decoding_order) + 1 for completion in exact.completions]
    assert plain.positions == engine.batch_positions(few_asked, steps, 2) > exact.positions
    assert caches.agreement(plain.completions, exact.completions)["equal_tokens"] > 0.9


def test_the_peers_of_the_engine_answer_what_the_plain_loop_does(tiny_dream, few_asked):
    """dLLM's loop token by token up to the end; both end answers where they are told to."""
    config = SamplerConfig(max_new_tokens=16, block_length=8, policy="confidence", stop_early=True)
    with engine.answers_that_end(tiny_dream) as ends:
        exact = engine.run_engine(tiny_dream, ends, few_asked, config, 4, None).completions
        prompts = [asked.prompt for asked in few_asked]
        ends.right_padded(few_asked, 16, tiny_dream.logit_rows)
        *_, x = engine.dllm_steps(tiny_dream, prompts, config)
        ends.left_padded(few_asked, 16, tiny_dream.logit_rows)
        dream = replace(config, policy="dream_entropy", steps=16, block_length=None)
        *_, y = engine.dream_steps(tiny_dream, prompts, dream)
    for (prompt, end), completion, row, other in zip(few_asked, exact, x.tolist(), y[:, -16:].tolist(), strict=True):
        assert completion.token_ids[:end] == row[len(prompt) :][:end]
        for answer in (completion.token_ids, row[len(prompt) :], other):
            assert answer.index(tiny_dream.eos_token_id) == end - 1


@pytest.mark.parametrize("name", ["engine-cpu", "engine-large-cpu"])
def test_the_table_of_the_engine_in_the_notes_is_what_its_json_says(name):
    figures = json.loads(Path(f"benchmarks/results/{name}.json").read_text())["figures"]
    assert engine.costs_table(figures) in Path("benchmarks/NOTES.md").read_text()


@pytest.mark.parametrize("document", ["docs/evidence.md", "docs/sampling.md", "benchmarks/NOTES.md"])
def test_how_many_fewer_positions_documents_claim_is_what_the_json_says(document):
    figures = json.loads(Path("benchmarks/results/engine-cpu.json").read_text())["figures"]

    def fewer(contender, digits, narrow):
        found = [f["fewer"] for f in figures if f["contender"] == contender and (f["lengths"] == "narrow") == narrow]
        return " to ".join(f"{value:.{digits}f}" for value in sorted({min(found), max(found)}))

    claim = (
        f"{fewer('exact', 1, False)} times fewer positions than padded batches where lengths differ widely, "
        f"{fewer('exact', 1, True)} times where they hardly do; with a block cache, an approximation, "
        f"{fewer('block', 0, False)} and {fewer('block', 0, True)} times"
    )
    assert claim in " ".join(Path(document).read_text().split())
    assert claim.partition(",")[0] in Path("README.md").read_text()


def test_what_caches_change_is_measured(capsys):
    fidelities = caches.fidelity(4)
    assert all(record["equal_responses"] == 1 for record in fidelities if record["contender"] == "exact")
    caches.print_caches(fidelities)
    assert "positions a token" in capsys.readouterr().out


def test_the_trainer_benchmark_runs_and_its_losses_agree(tiny_dream):
    diffusion_model = replace(tiny_dream, model=copy.deepcopy(tiny_dream.model))
    training = trainer.Training(diffusion_model)
    batch = trainer.make_batch(diffusion_model, 2, prompt=8, response=12, window=4)
    trainer.check_agreement(training, batch)
    for way in training.forwards:
        training.step(way, batch)
    assert 0 < trainer.share_of_head_and_loss(training, batch) < 1


def test_the_suite_runs_and_compares_with_a_stored_run(tmp_path):
    command = [sys.executable, "-m", "pytest", "benchmarks/suite.py", "-k", "softmax_entropy and 32000 and torch"]
    command += [f"--benchmark-storage={tmp_path}", "-p", "no:cacheprovider"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    save, compare = (
        subprocess.run([*command, option], capture_output=True, text=True, env=alone)
        for option in ("--benchmark-save=before", "--benchmark-compare")
    )
    assert save.returncode == compare.returncode == 0, save.stdout + compare.stdout
    assert "0001_before" in compare.stdout


def test_contenders_take_turns():
    order = []
    calls = {name: [lambda n=name, c=copy: order.append((n, c)) for copy in (0, 1)] for name in "ab"}
    contenders = [Contender(name, calls[name]) for name in "ab"]
    assert set(time_interleaved(contenders, CPU, rounds=2)) == {("a", "eager"), ("b", "eager")}
    assert order == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 0), ("b", 0)]  # the first round warms up


def test_summary_is_the_median_and_its_spread():
    assert summary([float(x) for x in range(11)]) == (5, 1, 9)


def test_peak_memory_counts_what_is_alive_at_once():
    def call():
        torch.empty(1000, dtype=torch.float64)
        first = torch.empty(2000, dtype=torch.float64)
        return first, torch.empty(3000, dtype=torch.float64)

    assert 5000 * 8 <= peak_memory_of(call, CPU) < 5100 * 8


def test_heads_judges_models_by_their_own_logits_and_loss(monkeypatch):
    """One of each kind: a scale, a soft-cap and padding, a loss of its own code, a head that does not fit."""
    names = ("CohereForCausalLM", "Inkling2ForCausalLM", "BartForCausalLM", "EsmForMaskedLM")
    cohere, inkling, bart, esm = map(heads.judge_in_time, names)
    assert cohere == inkling == bart == {"fused": "same", "rows": "same", "patched": "same"}
    assert esm == {"fused": "same, from its logits", "rows": "same", "patched": "same, from its logits"}
    monkeypatch.setattr("tabom.training.head_check.check_head", lambda *_: (None, 1))
    monkeypatch.setitem(LOGIT_FIELDS, "cohere", LogitFields())
    assert heads.judge_in_time("CohereForCausalLM")["fused"].startswith("WRONG: loss")
    assert heads.judge_in_time("GitForCausalLM").keys() == {"not tried"}


def test_what_the_page_on_the_loss_says_of_models_is_what_the_json_says():
    record = json.loads(Path("benchmarks/results/heads.json").read_text())
    page = " ".join(Path("docs/loss.md").read_text().split())
    count, models = record["counts"], record["models"]
    assert count == heads.counts(models) and count["rows"] == count["tried"]
    assert not any("WRONG" in answer for found in models.values() for answer in found.values())
    for words in (
        f"With transformers {record['transformers']}, of {count['classes']} classes: - {count['tried']} are tried.",
        f"{count['fused']} train fused, and the others from the logits of the rows: ",
        f"{count['patched']} train fused under `patch` with their own loss.",
    ):
        assert words in page
    others = [name for name, found in models.items() if found.get("fused") == heads.FROM_LOGITS]
    assert count["fused"] + len(others) == count["tried"]
    assert f"from the logits of the rows: {', '.join(f'`{name}`' for name in sorted(others))}." in page
    kept = [name for name, found in models.items() if found.get("patched") == heads.FROM_LOGITS]
    assert kept == others, "the three above keep their own loss"
    refused = [name for name, found in models.items() if "is an encoder-decoder" in found.get("patched", "")]
    assert f"Refused are {len(refused)} encoder-decoders" in page
    assert count["patched"] + len(kept) + len(refused) == count["tried"]


AUTHORS = "authors' way"


def test_figures_of_loss_step_and_sampler_are_those_of_the_json():
    loss_cpu, step, sampling = (
        json.loads(Path(f"benchmarks/results/{name}-cpu.json").read_text()) for name in ("loss", "trainer", "sampler")
    )
    alike = [f for f in loss_cpu["figures"] if (f["shape"]["rows"], f["shape"]["vocabulary"]) == (64, 152064)]
    seconds = {f["contender"]: f["seconds"]["median"] for f in alike}
    peaks = {f["contender"]: f["peak_bytes"] for f in alike}
    than = {name: value / seconds["ours, fused"] for name, value in seconds.items()}
    by_way = {f["way"]: f["seconds"]["median"] for f in step["figures"]}
    speeds = [f["tokens_per_second"] for f in sampling["figures"]]
    tiny, large = np.split(np.divide(speeds[::2], speeds[1::2]), 2)
    evidence, readme = (Path(name).read_text() for name in ("docs/evidence.md", "README.md"))
    for words in (
        f"{than[AUTHORS]:.0f} times faster than the loss as published with 1/"
        f"{peaks[AUTHORS] / peaks['ours, fused']:.0f} of its memory, {than['Liger CE + entropy']:.1f} times "
        f"faster than Liger's op with entropy, {than['TRL CE + entropy']:.1f} times than TRL's, "
        f"{than['torch.compile']:.1f} times than `torch.compile`, {1 / than['two matmuls']:.1f} times the two matmuls",
        f"{by_way['released'] / by_way['ours, fused']:.1f} times faster than with the released loss, "
        f"{by_way['reference'] / by_way['ours, fused']:.1f} times than with `reference`",
        f"{large.min():.1f} to {large.max():.1f} times the tokens a second of a loop that does what Dream's code does; "
        f"with a vocabulary of 45, {tiny.mean():.1f} times",
        *(f"at commit {document['commit'].rstrip('+')}" for document in (loss_cpu, step)),
    ):
        assert words in evidence, words
    [row] = re.findall(r"How fast is the fused loss\? \| (.*) \|", readme)
    assert row.removeprefix("at 64 rows of V = 152064: ") in evidence


def test_notes_say_of_the_loss_what_the_json_says():
    figures = json.loads(Path("benchmarks/results/loss-cpu.json").read_text())["figures"]
    notes = Path("benchmarks/NOTES.md").read_text()
    for rows, columns in ((64, 152064), (256, 152064), (1024, 152064), (4096, 126464)):
        alike = [f for f in figures if (f["shape"]["rows"], f["shape"]["vocabulary"]) == (rows, columns)]
        milliseconds = {f["contender"]: 1e3 * f["seconds"]["median"] for f in alike}
        peaks = {f["contender"]: f["peak_bytes"] / 2**20 for f in alike}
        ours, mebibytes = milliseconds["ours, fused"], peaks["ours, fused"]
        line = f"two matmuls: {milliseconds['two matmuls']:.0f} ms | | {ours:.0f} ms, {mebibytes:.0f} MiB"
        if AUTHORS in peaks:
            faster, smaller = milliseconds[AUTHORS] / ours, peaks[AUTHORS] / mebibytes
            line += f", {faster:.0f} times faster than as published with 1/{smaller:.0f} of the memory"
        assert f"2 CPU cores, {rows} rows, V = {columns}, D = 512 | {line} |" in notes, line
        others = ("torch.compile", "TRL CE + entropy", "Liger CE + entropy", "checkpoint", "reference")
        than = " | ".join(f"{milliseconds[name] / ours:.1f}" for name in others)
        assert f"\n| {rows} x {columns} | {than} |\n" in notes, than


def test_what_rounding_turns_is_counted_and_documents_say_what_the_json_says():
    counted = alone.near_ties(2)
    assert {record["model"] for record in counted} == {"the lab's, its tasks", "random weights"}
    records = json.loads(Path("benchmarks/results/engine-alone-cpu.json").read_text())["answers"]
    assert alone.near_ties_table(counted).count("\n") == alone.near_ties_table(records).count("\n")
    assert alone.near_ties_table(records) in Path("benchmarks/NOTES.md").read_text()
    [ours, batches] = (
        [r["other_answers"] for r in records if r["contender"] == contender] for contender in alone.CONTENDERS
    )
    assert sum(ours) == 0 < sum(batches), "else docs/sampling.md says too much"


def test_block_causal_decoding_is_counted_beside_the_loop(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCKS", (4,))
    monkeypatch.setattr(blocks, "random_sdar", partial(blocks.random_sdar, vocab_size=64, num_hidden_layers=1))
    requests = [blocks.Request([5, 6, 7][: 1 + i] * 3, 5 + i, 0) for i in range(3)]
    [record] = blocks.block_costs(requests, engine.seconds_now)
    assert record["engine"] <= record["loop"] <= record["floor"] < record["full_attention"]
    assert blocks.block_table([record]).count("\n") == 2


def test_the_table_of_block_causal_decoding_in_the_notes_is_what_its_json_says():
    figures = json.loads(Path("benchmarks/results/engine-block-cpu.json").read_text())["figures"]
    assert blocks.block_table(figures) in Path("benchmarks/NOTES.md").read_text()
    for record in figures:
        assert record["engine"] <= 1.1 * record["floor"] and record["full_attention"] >= 8 * record["engine"]
