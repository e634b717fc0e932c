"""AntiBERTy from the package `antiberty`: fills in regions of the heavy chains of human antibodies.

The sequences are those of a human repertoire, 1000 reads that the package `abstar` ships for its tests. Neither package
is imported: one gives a checkpoint and a vocabulary, the other a FASTA file.

A region is filled in between its left and its right context. A prompt of the library ends where the response begins, so
the response stands behind both contexts and the model is told by position ids where it belongs: attention itself knows
no order.
"""

import re
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertForMaskedLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import MaskedLMOutput

from benchmarks.pretrained.bases import Base, Task
from tabom.data.prompts import PromptSet

CODONS = dict(
    zip(
        map("".join, product("TCAG", repeat=3)),
        "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG",
        strict=True,
    )
)
"""The standard genetic code; `*` is a stop."""

HEAVY_CHAIN = re.compile(
    r"([A-Z]{5}C[A-Z]{9,16})"  # the end of framework 1 with its cysteine, and CDR1
    r"(W[A-Z]RQ[A-Z]{7}W[A-Z]{2})"  # framework 2
    r"([A-Z]{38,60}?[YF][YFH]C)"  # CDR2, and framework 3 with its cysteine
    r"([A-Z]{3,38})(WG[A-Z]GT[A-Z]{2}TVSS)"  # CDR3, framework 4
)
"""What stands in the translation of a whole read; what is before it are the primers of the sequencing."""

TESTED_SHARE = 0.2
TRAIN = 250
"""Prompts that are answered for training, at most."""

FRAMEWORK_3 = 12
"""How many residues at the end of framework 3 are filled in; all of framework 2 are."""

GAP = "_"
"""Stands in a prompt for the region to be filled in; the vocabulary knows it as [UNK]."""

PAD, UNKNOWN, BEGIN, END, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"


class InfillingConfig(BertConfig):
    """Of a `InfillingBert`."""

    model_type = "infilling_bert"
    is_causal = False


class InfillingBert(BertForMaskedLM):
    """A BERT that reads `[CLS] left _ right [SEP] region` as `[CLS] left region right [SEP]`.

    Nothing attends to the gap `_`. The region has the positions from that of the gap on, and what stands right of the
    gap has the positions behind the region.
    """

    config_class = InfillingConfig

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> MaskedLMOutput:
        """Logits (B, L, V) at the places of `input_ids` (B, L), which are padded on the right."""
        is_token = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        is_gap, is_end = (input_ids == self.config.gap_token_id), (input_ids == self.config.end_token_id).int()
        in_region = is_end.cumsum(1) > is_end
        region_length = (in_region * is_token).sum(1, keepdim=True)
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        start = is_gap.int().argmax(1, keepdim=True)
        before_region = (~in_region).sum(1, keepdim=True)
        positions = torch.where(is_gap.cumsum(1) > 0, place - 1 + region_length, place)
        positions = torch.where(in_region, start + place - before_region, positions)
        attention_mask = is_token * ~is_gap
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, **inputs)


AutoConfig.register(InfillingConfig.model_type, InfillingConfig)
AutoModelForCausalLM.register(InfillingConfig, InfillingBert)  # `load` takes it for every type it has no entry for


def residue_tokenizer(vocabulary: list[str]) -> PreTrainedTokenizerFast:
    """A token for each residue, with [CLS] and [SEP] around a prompt, as AntiBERTy was trained."""
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", special_tokens=[(token, ids[token]) for token in (BEGIN, END)]
    )
    special = {"pad_token": PAD, "unk_token": UNKNOWN, "cls_token": BEGIN, "sep_token": END, "mask_token": MASK}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def prepare(folder: Path) -> None:
    """Converts the checkpoint: the body and the masked-LM head, without the pooler and the heads of other tasks."""
    source = Path(find_spec("antiberty").origin).parent / "trained_models"
    tokenizer = residue_tokenizer((source / "vocab.txt").read_text().split())
    checkpoint = source / "AntiBERTy_md_smooth"
    settings = BertConfig.get_config_dict(checkpoint)[0]
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("max_position_embeddings", "hidden_act", "layer_norm_eps", "type_vocab_size")
    config = InfillingConfig(**{name: settings[name] for name in names})
    config.gap_token_id, config.end_token_id = tokenizer.unk_token_id, tokenizer.sep_token_id
    model = InfillingBert(config)
    weights = torch.load(checkpoint / "pytorch_model.bin", map_location="cpu", weights_only=True)
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def translations(read: str) -> list[str]:
    """The protein of a read of DNA in each of its three frames; a codon with an unknown base is a stop."""
    return ["".join(CODONS.get(read[i : i + 3], "*") for i in range(frame, len(read) - 2, 3)) for frame in range(3)]


def heavy_chains(fasta: str) -> list[tuple[str, ...]]:
    """The different heavy chains of a FASTA file of DNA, each as the five parts of `HEAVY_CHAIN`."""
    reads = ["".join(entry.split("\n")[1:]).upper() for entry in fasta.split(">")[1:]]
    found = (HEAVY_CHAIN.search(protein) for read in reads for protein in translations(read))
    return list(dict.fromkeys(match.groups() for match in found if match))


def is_tested(chain: tuple[str, ...]) -> bool:
    """Whether a chain is held out; all of one CDR3, as the members of a clone are, are on the same side."""
    return crc32(chain[3].encode()) % 100 < 100 * TESTED_SHARE


def task(name: str, chains: list[tuple[str, ...]], part: int, residues: int) -> Task:
    """Filling in the last residues of a part of every chain."""
    sets = {True: ([], []), False: ([], [])}
    for chain in chains:
        left, right = "".join(chain[:part]) + chain[part][:-residues], "".join(chain[part + 1 :])
        prompts, answers = sets[is_tested(chain)]
        prompts.append(f"{left}{GAP}{right}")
        answers.append(chain[part][-residues:])
    train, test = (PromptSet(name, *sets[tested]) for tested in (False, True))
    return Task(train.first(TRAIN), test, {"max_new_tokens": residues}, seconds_to_collect=560, seconds_of_run=240)


def tasks() -> dict[str, Task]:
    """Both regions by name."""
    source = Path(find_spec("abstar").origin).parent / "test_data" / "test_1k.fasta"
    chains = heavy_chains(source.read_text())
    return {
        "framework 3": task("framework 3", chains, 2, FRAMEWORK_3),
        "framework 2": task("framework 2", chains, 1, len(chains[0][1])),
    }


BASE = Base(
    prepare,
    tasks,
    max_steps=30,
    warmup_steps=20,
    batch_size=8,
    learning_rate=5e-5,
    seconds_to_prepare=1,
)
