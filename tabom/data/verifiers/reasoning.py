"""What of a response is addressed to its reader, as opposed to what was thought before it."""

import re

THOUGHTS = ("think", "thinking", "thought", "reasoning")
FINAL_CHANNEL = "<|channel|>final<|message|>"
OTHER_CHANNEL = "<|channel|>"
SPECIAL_TOKEN = re.compile(r"<\|\w{1,40}\|>|</s>|<eot>|<eos>")


def without_thoughts(response: str) -> str:
    """The response after its last thoughts; where they were begun and not ended, what stands before them."""
    response = response.rpartition(FINAL_CHANNEL)[2].partition(OTHER_CHANNEL)[0]
    for tag in THOUGHTS:
        response = response.rpartition(f"</{tag}>")[2].partition(f"<{tag}>")[0]
    return SPECIAL_TOKEN.sub("", response)
