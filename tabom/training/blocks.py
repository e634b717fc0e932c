"""Splits records into the blocks of block-causal models, each of which is learnt as a response of its own."""

from collections.abc import Iterator

from tabom.data.tokenized import TokenizedTrajectory
from tabom.data.trajectories import own_steps, response_blocks


def split_into_blocks(trajectory: TokenizedTrajectory, block_size: int) -> Iterator[TokenizedTrajectory]:
    """The trajectory of each block, whose prompt is all that stands before it.

    Its steps are its own (see `own_steps`).
    """
    prompt, response = trajectory.prompt_token_ids, trajectory.response_token_ids
    for block in response_blocks(len(prompt), len(response), block_size):
        non_ltr = trajectory.non_ltr_positions
        yield TokenizedTrajectory(
            prompt_token_ids=prompt + response[: block.start],
            response_token_ids=response[block],
            decoding_order=own_steps(trajectory.decoding_order[block]),
            non_ltr_positions=non_ltr and [i - block.start for i in non_ltr if block.start <= i < block.stop],
            entropy=trajectory.entropy and trajectory.entropy[block],
        )
