"""Tokenizes trajectories into an Arrow table in the cache, which later runs and other ranks map into memory."""

import hashlib
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets import Features, List, Value
from datasets.fingerprint import generate_random_fingerprint
from transformers import PreTrainedTokenizerBase
from transformers import __version__ as transformers_version

from tabom.data.encoding import check_prompt, encode_prompt, has_unknown_text
from tabom.data.shapes import unused_fields, warn_of_unused
from tabom.data.sources import BATCH, Listed, Records, bars_of_many, open_records
from tabom.data.text import printable
from tabom.data.trajectories import fit_response, is_of, misplaced, none_left, parse_trajectory
from tabom.models.writing import naming_full_disk

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizedTrajectory:
    """The part of a row that training uses; `Trajectory` documents the fields."""

    prompt_token_ids: list[int]
    response_token_ids: list[int]
    decoding_order: list[int]
    non_ltr_positions: list[int] | None
    entropy: list[float] | None
    logprob: list[float] | None = None

    @classmethod
    def of(cls, row: dict[str, Any]) -> "TokenizedTrajectory":
        """The part of a row of a table, or of `Tokenization.row`."""
        return cls(**{each.name: row[each.name] for each in fields(cls)})

    def digest(self) -> bytes:
        """A hash of the whole content, 8 bytes; without log-probabilities it is what it was before there were any."""
        content = list(vars(self).values())
        return hashlib.sha256(json.dumps(content if self.logprob else content[:-1]).encode()).digest()[:8]


FEATURES = Features(
    {
        "prompt_token_ids": List(Value("int32")),
        "response_token_ids": List(Value("int32")),
        "decoding_order": List(Value("int64")),
        "non_ltr_positions": List(Value("int32")),
        "entropy": List(Value("float64")),
        "logprob": List(Value("float64")),
        "temperature": Value("float64"),
        "reward": Value("float64"),
        "group": Value("string"),
        "method": Value("string"),
        "data_source": Value("string"),
        "digest": Value("binary"),
    }
)
"""Columns of a tokenized table: a `TokenizedTrajectory`, what else a policy loss needs, its origin and its digest."""

NOTES = {
    "invalid": Value("bool"),
    "unused": List(Value("string")),
    "prompt cut": Value("bool"),
    "response cut": Value("bool"),
    "unknown text": Value("bool"),
}
"""Further columns of a table in the cache, which has a row for every record: whether it is invalid, its fields with
text that is not used, what of it was cut, and whether it has text that the vocabulary does not have. The rows of
invalid records and of other methods are empty.
"""


@dataclass(frozen=True)
class Tokenization:
    """Makes rows of records; the fields are arguments of `tokenize`."""

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int | None = None
    max_prompt_length: int | None = None
    max_response_length: int | None = None
    pad_token_id: int | None = None
    method: Sequence[str] | None = None
    skip_invalid: bool = False
    logits_shift: int = 0
    block_padding: tuple[int, int] | None = None

    def rows(self, indices: Sequence[int], records: Records, source: Any) -> dict[str, list[Any]]:
        """The columns of these records.

        Raises:
            ValueError: a record is invalid and `skip_invalid` is False.
        """
        rows = []
        for place, record in records.read(indices):
            try:
                rows.append(self.row(record))
            except ValueError as error:
                if not self.skip_invalid:
                    raise misplaced(source, place, error) from error
                rows.append({"invalid": True})
        return {name: [row.get(name) for row in rows] for name in FEATURES | NOTES}

    def row(self, record: Any) -> dict[str, Any]:
        """The row of a record or trajectory; only its method if that is not one of `method`.

        Raises:
            ValueError: the record is invalid.
        """
        if isinstance(record, ValueError):
            raise record
        unused: list[str] = []
        if isinstance(record, dict):
            if not is_of(self.method, record):
                return {"method": str(record.get("method")).encode(errors="replace").decode()}
            trajectory = parse_trajectory(record, self.tokenizer, self.vocab_size)
            unused = unused_fields(record, trajectory.prompt, trajectory.response)
            record = trajectory
        whole = encode_prompt(self.tokenizer, record.prompt)
        notes = {
            "prompt cut": self.max_prompt_length is not None and len(whole) > self.max_prompt_length,
            "response cut": self.max_response_length is not None
            and len(record.response_token_ids) > self.max_response_length,
            "unknown text": has_unknown_text(self.tokenizer, [*whole, *record.response_token_ids]),
        }
        if self.max_response_length is not None:
            record = fit_response(record, self.max_response_length, self.pad_token_id)
        prompt_token_ids = whole
        if notes["prompt cut"]:
            prompt_token_ids = encode_prompt(self.tokenizer, record.prompt, self.max_prompt_length)
        if self.block_padding is not None:
            block_size, pad_token_id = self.block_padding
            length = len(record.response_token_ids)
            missing = -(len(prompt_token_ids) + length) % block_size
            record = fit_response(record, length + missing, pad_token_id)
        tokenized = TokenizedTrajectory(
            prompt_token_ids=prompt_token_ids,
            response_token_ids=record.response_token_ids,
            decoding_order=record.decoding_order,
            non_ltr_positions=record.non_ltr_positions,
            entropy=record.entropy,
            logprob=record.logprob,
        )
        check_prompt(len(tokenized.prompt_token_ids), self.logits_shift)
        others = {name: getattr(record, name) for name in ("temperature", "reward", "group", "method", "data_source")}
        return {**vars(tokenized), **others, "digest": tokenized.digest(), "unused": unused, **notes}

    def fingerprint(self) -> str:
        """A hash that changes when the settings or the code that makes rows change."""
        settings = {name: value for name, value in vars(self).items() if name != "tokenizer"}
        digest = hashlib.sha256(json.dumps([settings, transformers_version]).encode())
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            for path in (*sorted(Path(folder).glob("*")), *sorted(Path(__file__).parent.glob("*.py"))):
                digest.update(path.read_bytes())
        return digest.hexdigest()


def tokenize(
    source: Any,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int | None = None,
    *,
    split: str | None = None,
    config_name: str | None = None,
    method: Sequence[str] | None = None,
    skip_invalid: bool = False,
    max_prompt_length: int | None = None,
    max_response_length: int | None = None,
    pad_token_id: int | None = None,
    logits_shift: int = 0,
    block_padding: tuple[int, int] | None = None,
    num_proc: int | None = None,
) -> tuple[datasets.Dataset, int]:
    """Tokenizes trajectories into a table that is mapped from a file, so that it need not fit in memory.

    The file is in the cache of `datasets`, in `tabom/`. It is made again when the source, the tokenizer or an argument
    has changed. Records in memory are tokenized in memory.

    Args:
        source, split, config_name: see `tabom.data.sources.open_records`; or a table that this function made, which is
            returned unchanged. Default split: train.
        vocab_size: the model's; token ids must be below it. None: any will do.
        method: keep only the records whose `method` field is one of these; None, or "all" among them: every record.
        skip_invalid: count and leave out the records that do not parse, instead of raising.
        max_prompt_length: tokens; see `tabom.data.encoding.encode_prompt` for what is cut.
        max_response_length: tokens; the end is cut.
        pad_token_id: fills responses up to `max_response_length`; None: they stay as long as they are.
        block_padding: block size and padding token that fills the last block of a response; None: it stays as it is.
        logits_shift: the model's; a record whose prompt has fewer tokens is invalid.
        num_proc: processes that tokenize; default: this one.

    Returns:
        A table with the columns of `FEATURES`, and how many records were invalid.

    Raises:
        ValueError: a record is invalid (names file, line and field), or nothing is left.
    """
    if isinstance(source, datasets.Dataset) and set(FEATURES) <= set(source.column_names):
        return source, 0
    records = open_records(source, split, config_name, default_split="train")
    lengths = (max_prompt_length, max_response_length, pad_token_id)
    tokenization = Tokenization(tokenizer, vocab_size, *lengths, method, skip_invalid, logits_shift, block_padding)
    table = make_table(records, tokenization, source, num_proc)
    kept = np.flatnonzero(pc.is_valid(table.data.column("digest")))
    invalid = len(table) - table.data.column("invalid").null_count
    if not len(kept) and not isinstance(records, Listed):
        others = Counter(each["method"] for each in table if not each["invalid"])
        raise none_left(source, method, others, invalid)
    warn_of_notes(source, table, tokenization)
    warn_of_unused(source, set(pc.list_flatten(table.data.column("unused")).unique().to_pylist()))
    return table.select(kept).remove_columns(list(NOTES)), invalid


def warn_of_notes(source: Any, table: datasets.Dataset, tokenization: Tokenization) -> None:
    """Says how many prompts and responses were cut, and how many records have text that the vocabulary does not."""
    name = f"{source}: " if isinstance(source, str | Path) else ""
    limits = {
        "prompt cut": f"prompts cut to max_prompt_length={tokenization.max_prompt_length} tokens",
        "response cut": f"responses cut to max_response_length={tokenization.max_response_length} tokens",
        "unknown text": "records with text that the model's vocabulary does not have",
    }
    for column, words in limits.items():
        if count := pc.sum(table.data.column(column)).as_py():
            logger.warning(printable(f"{name}{count} of {len(table)} {words}"))


def make_table(records: Records, tokenization: Tokenization, source: Any, num_proc: int | None) -> datasets.Dataset:
    """The table with a row for each record, from the cache if it is there."""
    features = Features(FEATURES | NOTES)
    if not len(records):
        return datasets.Dataset.from_dict({name: [] for name in features}, features=features)
    fingerprint, path = generate_random_fingerprint(), None
    if records.fingerprint is not None:
        whole = f"{records.fingerprint} {tokenization.fingerprint()}"
        fingerprint = hashlib.sha256(whole.encode()).hexdigest()[:32]
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "tabom"
        folder.mkdir(parents=True, exist_ok=True)
        path = str(folder / f"{fingerprint}.arrow")
    # A table of indices: each process reads the records that it tokenizes, and none holds them all.
    indices = datasets.Dataset.from_dict({"index": range(len(records))})
    with bars_of_many(len(records)), naming_full_disk(datasets.config.HF_DATASETS_CACHE):
        return indices.map(
            tokenization.rows,
            batched=True,
            batch_size=BATCH,
            writer_batch_size=BATCH,
            input_columns="index",
            remove_columns="index",
            fn_kwargs={"records": records, "source": source if isinstance(source, str | Path) else None},
            features=features,
            cache_file_name=path,
            new_fingerprint=fingerprint,
            num_proc=num_proc,
            desc="Tokenizing",
        )
