"""The benchmark of pretrained models on random models of two layers, with neither package installed."""

import json
from dataclasses import replace
from importlib.machinery import ModuleSpec

import pytest
import torch
from transformers import BertForMaskedLM

import benchmarks.pretrained.__main__ as pretrained
from benchmarks.pretrained import antiberty, smollm2
from tabom.data.json_files import finished_lines
from tabom.models.loading import load

TOKENS = "[PAD] [UNK] [CLS] [SEP] [MASK] A C D E F G H I K L M N P Q R S T V W Y"
VOCABULARY = TOKENS.split()
SIZES = {
    "vocab_size": 25,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "type_vocab_size": 2,
}
CODONS = {residue: codon for codon, residue in antiberty.CODONS.items()}
PARTS = ("GGSLRLSCAASGFTFSSYAMH", "WVRQAPGKGLEWVS", "AISGSGGSTYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYC")


def chain(cdr3):
    """The DNA of a heavy chain, with a primer before it that shifts its frame."""
    return "GA" + "".join(CODONS[residue] for residue in "".join([*PARTS, cdr3, "WGQGTLVTVSS"]))


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """What the packages `antiberty` and `abstar` hold, in small, with random weights."""
    torch.manual_seed(0)
    config = antiberty.InfillingConfig(**SIZES)
    weights = BertForMaskedLM(config).state_dict()
    weights = {name: torch.randn_like(each) for name, each in weights.items()}  # biases are not 0 either
    weights |= {"cls.species.weight": torch.zeros(6, 16)}
    checkpoint = tmp_path / "antiberty" / "trained_models" / "AntiBERTy_md_smooth"
    checkpoint.mkdir(parents=True)
    torch.save(weights, checkpoint / "pytorch_model.bin")
    (checkpoint / "config.json").write_text(json.dumps(SIZES | {"model_type": "bert", "_name_or_path": "elsewhere"}))
    (checkpoint.parent / "vocab.txt").write_text("\n".join(VOCABULARY))
    data = tmp_path / "abstar" / "test_data"
    data.mkdir(parents=True)
    reads = [chain(f"AR{a}{b}Y") for a in "DEGH" for b in "DEGH"]
    (data / "test_1k.fasta").write_text("".join(f">{i}\n{read}\n" for i, read in enumerate([*reads, reads[0], "ACG"])))
    monkeypatch.setattr(
        antiberty, "find_spec", lambda name: ModuleSpec(name, None, origin=str(tmp_path / name / "__init__.py"))
    )


def test_a_region_is_read_between_its_contexts(packages, tmp_path):
    """As by transformers' own BERT, in a batch with padding, and not seeing the gap."""
    antiberty.prepare(tmp_path / "model")
    model = load(tmp_path / "model")
    assert model.logits_shift == 0 and model.mask_token_id == VOCABULARY.index("[MASK]")
    sequences = [("ACD", "MM", "EFGH"), ("AC", "MMMM", "K"), ("W", "MMMMM", "")]
    rows = [model.tokenizer(f"{left}_{right}").input_ids + [4] * len(region) for left, region, right in sequences]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    is_token = torch.tensor([[i < len(row) for i in range(length)] for row in rows])
    logits = model.model(input_ids=ids, attention_mask=is_token.long()).logits
    for row, found, (left, region, right) in zip(rows, logits, sequences, strict=True):
        plain = model.tokenizer(left + right).input_ids
        start, count = 1 + len(left), len(region)
        own = torch.tensor([[*plain[:start], *[4] * count, *plain[start:]]])
        expected = BertForMaskedLM.forward(model.model, input_ids=own).logits[0, start : start + count]
        torch.testing.assert_close(found[len(row) - count : len(row)], expected)


def test_the_chains_are_found_in_their_frame_and_clones_stay_together(packages):
    tasks = antiberty.tasks()
    task, other = tasks["framework 3"], tasks["framework 2"]
    assert len(task.train.prompts) + len(task.test.prompts) == 16  # one read is there twice, one is no chain
    assert not set(task.train.prompts) & set(task.test.prompts)
    assert set(task.train.answers) == {"SLRAEDTAVYYC"} and set(other.test.answers) == {"WVRQAPGKGLEWVS"}
    prompt = task.train.prompts[0].split("_")
    assert prompt[0].startswith("SLRLSCAASG") and prompt[0].endswith("LYLQMN") and prompt[1].endswith("WGQGTLVTVSS")
    one_cdr3 = {antiberty.is_tested((*others, "ARDY", "WGQG")) for others in (("A", "B", "C"), ("D", "E", "F"))}
    assert len(one_cdr3) == 1


def test_dates_in_words():
    assert [smollm2.number(n, smollm2.NUMBERS) for n in (1, 20, 21, 40, 99)] == [
        "one",
        "twenty",
        "twenty-one",
        "forty",
        "ninety-nine",
    ]
    assert [smollm2.number(n, smollm2.ORDINALS) for n in (3, 20, 28)] == ["third", "twentieth", "twenty-eighth"]
    for task in smollm2.tasks().values():
        texts = [each[-1]["content"] for each in task.train.prompts + task.test.prompts]
        assert len(set(texts)) == smollm2.TRAIN + smollm2.TEST == len(texts)


def test_places_are_words_or_characters():
    """A place that is missing in the response is wrong."""
    assert pretrained.recovered("a bread c", "a bread") == pytest.approx(2 / 3)
    assert pretrained.recovered("ACDE", "ACEE") == 0.75
    assert pretrained.recovered("a b", "a b c") == 1


def test_every_run_is_made_once(packages, tmp_path, monkeypatch, capsys):
    """Every answer counts as right, because random models have no right ones; only the missing runs are made again."""

    def lenient(prompts, count):
        return replace(prompts.first(count), check=lambda prompt, answer, response: True, verifier="lenient")

    def tasks():
        every = antiberty.tasks().items()
        return {name: task._replace(train=lenient(task.train, 3), test=lenient(task.test, 2)) for name, task in every}

    trained_on, own_trained = [], pretrained.trained

    def trained(*arguments):
        trained_on.append(arguments[3])
        return own_trained(*arguments)

    base = antiberty.BASE._replace(tasks=tasks, max_steps=2, batch_size=2, learning_rate=1.0)
    monkeypatch.setattr(pretrained, "BASES", {"antiberty": base})
    methods = ("NELBO, exact weights", "TABOM, parallel")
    monkeypatch.setattr(pretrained, "METHODS", methods)
    monkeypatch.setattr(pretrained, "RESULT", tmp_path / "result.jsonl")
    monkeypatch.setattr(pretrained, "trained", trained)
    arguments = ["--base", "antiberty", "--folder", str(tmp_path / "runs"), "--seeds", "0"]
    of_other_task = {"base": "antiberty", "task": "framework 2", "method": pretrained.UNTRAINED}
    of_other_task |= {"learning_rate": 0, "seed": 0}
    pretrained.RESULT.write_text(json.dumps(of_other_task) + "\n")
    pretrained.main(arguments)
    assert "3 runs are missing, about 0.4 hours" in capsys.readouterr().out
    _, *runs = finished_lines(pretrained.RESULT)
    assert [run["method"] for run in runs] == [pretrained.UNTRAINED, *methods]
    assert [run["kept"] for run in runs] == [None, 3, 3]
    steps = [{max(each.decoding_order) + 1 for each in data} for data in trained_on]
    assert steps == [{12}, {12}]  # the slowest right response, which is here always that of one token a step
    assert {run["measured"]["4 a step"]["right"] for run in runs} == {"11"}
    assert len({str(run["measured"]["pair order"]) for run in runs}) == 3  # the methods train, differently

    lines = pretrained.RESULT.read_text().splitlines(keepends=True)
    pretrained.RESULT.write_text("".join(lines[:-1]) + lines[-1][:40])  # killed while it wrote
    pretrained.main(arguments)
    assert "1 runs are missing" in capsys.readouterr().out
    _, *again = finished_lines(pretrained.RESULT)
    assert again[:-1] == runs[:-1] and again[-1]["measured"] == runs[-1]["measured"]


def test_the_tables_pair_runs_by_seed():
    """Errors over seeds and over problems, by hand."""

    def run(method, seed, right):
        scores = {"right": right, "recovered": [1 if digit == "1" else 0.5 for digit in right]}
        names = ("1 a step", "2 a step", "4 a step", "other task")
        measured = {name: scores for name in names} | {"pair order": [0.25, 0.75]}
        rate = 0 if method == pretrained.UNTRAINED else 1e-4
        return {"method": method, "learning_rate": rate, "seed": seed, "measured": measured}

    first, second = "whole path", "NELBO, exact weights"
    runs = [run(second, 2, "0000"), run(first, 0, "1100"), run(first, 2, "1000"), run(second, 0, "1000")]
    runs += [run(pretrained.UNTRAINED, 0, "1000"), run(first, 1, "1111")]
    other_rate = run(second, 0, "1111") | {"learning_rate": 0.1}
    of_rate, of_other_rate = pretrained.tables([*runs, other_rate]).split("\n\n| LR 0.1 ")
    assert "25.0 (25.0)" in of_other_rate and f"| {second} | 1 | 100.0 (0.0)" in of_other_rate
    lines = of_rate.split("\n")
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in lines if line}
    assert cells["base"][:3] == ["1", "25.0 (25.0)", "62.5 (12.5)"]
    assert cells[second][:4] == ["2", "12.5 ±12.5 (12.5)", "56.2 ±6.2 (6.2)", "12.5 ±12.5 (12.5)"]
    assert cells[f"{first}, less {second}"][0] == "+25.0 ±0.0 (14.4)"  # seed 1 has no partner
    assert cells[f"{first}, less {second}"][-1] == "+0.0 ±0.0 (0.0)"
