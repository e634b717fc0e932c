"""Trajectories from anywhere become the same table, once."""

import json
import os
import subprocess
import sys

import datasets
import pytest
import torch

from tabom.data import tokenized
from tabom.data.tokenized import FEATURES, TokenizedTrajectory, tokenize
from tabom.data.trajectories import parse_trajectory
from tabom.lab.model import character_tokenizer
from tabom.training.examples import TrajectoryDataset
from tabom.training.objectives import ObjectiveSettings

TOKENIZER = character_tokenizer()
QUESTION = [{"role": "user", "content": "1+1="}]
RECORDS = [
    {"prompt": "1+1=", "response": "22", "response_token_ids": [5, 6], "decoding_order": [1, 0], "entropy": [0.5, 2.0]},
    {"prompt": "1+2=", "response": "33", "non_ltr_positions": [0], "method": "a", "data_source": "b"},
    {"prompt": "1+3=", "response": "44"},
]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def parsed(monkeypatch):
    """The records that are parsed from here on."""
    seen = []

    def parse(record, *args):
        seen.append(record)
        return parse_trajectory(record, *args)

    monkeypatch.setattr(tokenized, "parse_trajectory", parse)
    return seen


def in_every_form(folder, records):
    names = {name: None for record in records for name in record}
    table = datasets.Dataset.from_list([names | record for record in records])
    table.to_parquet(folder / "t.parquet")
    table.save_to_disk(folder / "saved")
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(folder / "splits")
    return {
        "jsonl": write_lines(folder / "t.jsonl", records),
        "parquet": folder / "t.parquet",
        "saved": folder / "saved",
        "splits": folder / "splits",
        "table": table,
        "torch table": table.with_format("torch"),
        "from disk": datasets.load_from_disk(folder / "saved"),
        "dicts": records,
        "trajectories": [parse_trajectory(record, TOKENIZER, len(TOKENIZER)) for record in records],
    }


def test_every_form_of_the_same_records_gives_the_same_examples(tmp_path):
    expected = [parse_trajectory(record, TOKENIZER, len(TOKENIZER)) for record in RECORDS]
    digests = set()
    for form, source in in_every_form(tmp_path, RECORDS).items():
        table, invalid = tokenize(source, TOKENIZER, len(TOKENIZER))
        assert invalid == 0 and set(table.column_names) == set(FEATURES), form
        for row, trajectory in zip(table, expected, strict=True):
            assert row["prompt_token_ids"] == TOKENIZER(trajectory.prompt).input_ids
            for name in FEATURES.keys() & vars(trajectory).keys():
                assert row[name] == getattr(trajectory, name), (form, name)
        digests.add(TrajectoryDataset(table, TOKENIZER, ObjectiveSettings(), seed=0).digest)
    assert len(digests) == 1


def test_what_is_taught_and_its_order_decide_the_digest():
    def digest(records):
        return TrajectoryDataset(records, TOKENIZER, ObjectiveSettings(), seed=0).digest

    plain = {"response_token_ids": [5, 6], "decoding_order": [1, 0], "entropy": [1.0, 2.0], "non_ltr_positions": [1]}
    plain |= {"prompt": "1", "response": ""}
    changes = [{"prompt": "2"}, {"response_token_ids": [6, 5]}, {"decoding_order": [0, 1]}, {"entropy": [1.0, 2.5]}]
    changes += [{"non_ltr_positions": [0]}, {"non_ltr_positions": []}, {"entropy": None}]
    digests = [digest([plain, plain | change]) for change in changes] + [digest([plain | changes[0], plain])]
    assert len(set(digests)) == len(digests)
    assert digest([plain | {"method": "x", "response": "y"}]) == digest([plain])


def test_a_source_is_parsed_once(tmp_path, parsed):
    records = [*RECORDS, {"prompt": "4+4=", "response": "8"}]  # no other test's: tables are known by their content
    forms = in_every_form(tmp_path, records)
    for form in ("jsonl", "parquet", "saved", "table"):
        parsed.clear()
        first, _ = tokenize(forms[form], TOKENIZER, len(TOKENIZER))
        count, (file,) = len(parsed), first.cache_files
        again, _ = tokenize(forms[form], character_tokenizer(), len(TOKENIZER))
        assert len(parsed) == count == len(records), form
        assert again.cache_files == [file] and again[:] == first[:]
        parsed.clear()
        assert tokenize(first, TOKENIZER, len(TOKENIZER)) == (first, 0) and not parsed


def test_what_would_change_a_row_makes_it_anew(tmp_path, parsed):
    path = write_lines(tmp_path / "t.jsonl", RECORDS)
    with_template = character_tokenizer()
    with_template.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for options in (
        {},
        {"vocab_size": 50},
        {"method": ["a"]},
        {"max_prompt_length": 2},
        {"max_response_length": 1},
        {"max_response_length": 4, "pad_token_id": 0},
        {"tokenizer": with_template},
    ):
        parsed.clear()
        table, _ = tokenize(path, **{"tokenizer": TOKENIZER, "vocab_size": len(TOKENIZER)} | options)
        assert len(parsed) == (1 if "method" in options else 3), options
    assert [len(row["response_token_ids"]) for row in table] == [2, 2, 2]
    parsed.clear()
    write_lines(path, RECORDS[::-1])  # as many bytes
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    table, _ = tokenize(path, TOKENIZER, len(TOKENIZER))
    assert len(parsed) == 3 and table[2]["response_token_ids"] == [5, 6]


def test_numbers_of_any_size_fit():
    record = {**RECORDS[0], "decoding_order": [2**31 - 1, 0], "entropy": [10**300, -1]}
    table, _ = tokenize([record], TOKENIZER, len(TOKENIZER), max_response_length=3, pad_token_id=0)
    assert table[0]["decoding_order"] == [2**31 - 1, 0, 2**31] and table[0]["entropy"] == [1e300, -1, 0]


def test_lengths_are_cut_and_filled(tmp_path):
    options = {"max_prompt_length": 2, "max_response_length": 3}
    table, _ = tokenize(RECORDS, TOKENIZER, len(TOKENIZER), **options, pad_token_id=0)
    assert [row["prompt_token_ids"] for row in table] == [TOKENIZER(f"{n}=").input_ids for n in "123"]
    assert table[0]["response_token_ids"] == [5, 6, 0] and table[0]["decoding_order"] == [1, 0, 2]
    cut, _ = tokenize(RECORDS, TOKENIZER, len(TOKENIZER), max_response_length=1)
    assert [row["decoding_order"] for row in cut] == [[1], [0], [0]]


def test_another_process_reads_what_the_first_has_tokenized(tmp_path):
    path = write_lines(tmp_path / "t.jsonl", RECORDS)
    table, _ = tokenize(path, TOKENIZER, len(TOKENIZER))
    program = (
        "import sys\n"
        "from tabom.data import tokenized\n"
        "from tabom.lab.model import character_tokenizer\n"
        "tokenized.parse_trajectory = None\n"
        "tokenizer = character_tokenizer()\n"
        "print(tokenized.tokenize(sys.argv[1], tokenizer, len(tokenizer))[0].cache_files[0]['filename'])\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", program, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.stdout.strip() == table.cache_files[0]["filename"], result.stderr


def test_invalid_records_are_named_or_counted_also_from_the_cache(tmp_path, parsed):
    broken = {"prompt": "1", "response": "2", "decoding_order": [0, 1, 2]}
    lines = write_lines(tmp_path / "t.jsonl", [RECORDS[2], broken, RECORDS[2]])
    table = datasets.Dataset.from_list([RECORDS[2] | {"decoding_order": None}, broken])
    for source, place in ((lines, rf"{lines}, line 2"), (table, "record 2"), ([RECORDS[2], broken], "record 2")):
        for num_proc in (None, 2):
            with pytest.raises(ValueError, match=rf"^{place}: field 'decoding_order': has 3 steps for 1 response tok"):
                tokenize(source, TOKENIZER, len(TOKENIZER), num_proc=num_proc)
    parsed.clear()
    for _ in range(2):
        table, invalid = tokenize(lines, TOKENIZER, len(TOKENIZER), skip_invalid=True)
        assert (len(table), invalid, len(parsed)) == (2, 1, 3)
    template = character_tokenizer()
    template.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ValueError, match=r"t\.jsonl, line 1: the chat template fails"):
        tokenize(lines, template, len(TOKENIZER))


def test_methods_are_kept_and_what_is_left_out_is_said(tmp_path):
    records = [{**RECORDS[2], "method": method} for method in ("a", "b", "a", "\ud800")] + [{"method": "b"}]
    path = write_lines(tmp_path / "t.jsonl", records)
    assert [row["method"] for row in tokenize(path, TOKENIZER, method=["a"])[0]] == ["a", "a"]
    with pytest.raises(ValueError, match=r"no valid trajectory with method c, but 2 a, 2 b, 1 \? \(.*\(0 invalid"):
        tokenize(path, TOKENIZER, method=["c"])
    with pytest.raises(ValueError, match="line 4: field 'method': half a surrogate pair"):
        tokenize(path, TOKENIZER)
    with pytest.raises(ValueError, match=r"empty\.jsonl: no valid trajectory"):
        tokenize(write_lines(tmp_path / "empty.jsonl", []), TOKENIZER)


def test_several_processes_make_the_same_table(tmp_path):
    records = [{"prompt": str(index), "response": str(index)} for index in range(250)]
    one, two = (write_lines(tmp_path / f"{name}.jsonl", records) for name in "ab")
    tables = tokenize(one, TOKENIZER)[0], tokenize(two, TOKENIZER, num_proc=2)[0]
    assert tables[0][:] == tables[1][:]
    assert len(tables[1].cache_files) == 2
    assert tokenize(two, TOKENIZER, num_proc=None)[0].cache_files == tables[1].cache_files


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": QUESTION, "completion": [{"role": "assistant", "content": "2"}]},
        {"prompt": "1+1=", "completion": "2"},
        {"messages": [*QUESTION, {"role": "assistant", "content": "2"}]},
        {"prompt": "1+1=", "completion": 2},
        {"question": "1+1=", "answer": 2.0},
    ],
)
@pytest.mark.parametrize("form", ["jsonl", "parquet", "table", "dicts"])
def test_columns_of_trl_and_numbers_and_what_arrow_fills_in(tmp_path, record, form):
    """Every record stands beside one with all other fields, so that a table holds None where it has none."""
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}{{ m | length }}-{{ m.content }}={% endfor %}"
    full = {"response_token_ids": [5], "decoding_order": [0], "non_ltr_positions": [0], "entropy": [0.5], **record}
    for name in ("messages", "prompt", "completion"):
        if isinstance(record.get(name), list):
            full[name] = [{**message, "name": "x"} for message in record[name]]
    table, _ = tokenize(in_every_form(tmp_path, [record, full])[form], tokenizer, len(tokenizer))
    row = table[0]
    assert tokenizer.decode(row["prompt_token_ids"]) == "u2-1+1=="
    assert tokenizer.decode(row["response_token_ids"]) == "a2-2="
    assert (row["decoding_order"], row["non_ltr_positions"], row["entropy"]) == ([0, 1, 2, 3, 4], None, None)


def test_a_data_set_of_torch_is_one_too():
    class Records(torch.utils.data.Dataset):
        def __len__(self):
            return len(RECORDS)

        def __getitem__(self, index):
            return RECORDS[index]

    assert tokenize(Records(), TOKENIZER)[0].to_list() == tokenize(RECORDS, TOKENIZER)[0].to_list()


def test_what_is_no_data_set_is_refused():
    table = datasets.Dataset.from_list(RECORDS)
    with pytest.raises(ValueError, match=r"a DatasetDict of a, b: pass one of them, such as data\['a'\]"):
        tokenize(datasets.DatasetDict(a=table, b=table), TOKENIZER)
    for other in (table.to_iterable_dataset(), table.to_pandas(), {"prompt": "1"}, 3):
        with pytest.raises(TypeError, match=f"{type(other).__name__}: expected a datasets.Dataset, or a list"):
            tokenize(other, TOKENIZER)
    assert len(tokenize([], TOKENIZER)[0]) == 0


def test_rows_are_what_a_trajectory_of_tokens_holds():
    assert set(TokenizedTrajectory.__dataclass_fields__) < set(FEATURES)
