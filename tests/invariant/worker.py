"""Runs command lines of `tabom` one after the other in one process group: starting Python takes longer than they do.

    python -m torch.distributed.run --standalone --nproc_per_node 2 -m tests.invariant.worker FILE.json

The file holds a list of command lines. `--fsdp` shards on a CPU as it would on GPUs.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from tabom.cli.main import main
from tabom.data.tokenized import Tokenization
from tabom.training.trainer import TabomTrainer


def shard_on_a_cpu():
    """accelerate switches FSDP on for accelerators only: sets what it sets there."""
    plain = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is None:
            return
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self.mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self.mixed_precision)
        self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


def watch_sharding():
    """After a sharded run all that was trained must be a DTensor."""
    plain = TabomTrainer.train

    def train(self, **kwargs):
        result = plain(self, **kwargs)
        sharded = [isinstance(p, DTensor) for p in self.model.parameters()]
        assert all(sharded) if self.args.fsdp else not any(sharded)
        return result

    TabomTrainer.train = train


def watch_tokenizing():
    """Ranks other than the first must find in the cache what that one has tokenized of a file."""
    plain = Tokenization.rows

    def rows(self, indices, records, source):
        assert source is None or os.environ["RANK"] == "0", f"rank {os.environ['RANK']} tokenizes {source}"
        return plain(self, indices, records, source)

    Tokenization.rows = rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    shard_on_a_cpu()
    watch_sharding()
    watch_tokenizing()
    for command_line in json.loads(Path(sys.argv[1]).read_text()):
        AcceleratorState._reset_state(reset_partial_state=True)
        if main(command_line) != 0:
            sys.exit(f"failed: {command_line}")
