"""`tabom merge`: an adapter and its base become one model."""

import torch

from tabom.cli.commands import MergeArguments
from tabom.models.merging import merge_adapter


def run(arguments: MergeArguments) -> None:
    """Merges and saves."""
    merge_adapter(
        arguments.adapter,
        arguments.output_dir,
        dtype=getattr(torch, arguments.dtype),
        trust_remote_code=arguments.trust_remote_code,
    )
    print(f"{arguments.output_dir}: {arguments.adapter} merged into its base, {arguments.dtype}")
