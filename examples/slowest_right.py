"""Puts files of `tabom collect` together: of each prompt the responses with the fewest tokens a step.

    python examples/slowest_right.py t-1.jsonl t-2.jsonl t-4.jsonl > t.jsonl

A file's responses to a prompt are left out if a file before it has some, so the slowest pace comes first.
"""

import json
import sys
from collections.abc import Iterator, Sequence


def slowest_right(paths: Sequence[str]) -> Iterator[str]:
    """The lines that are kept."""
    answered: set[str] = set()
    for path in paths:
        with open(path, encoding="utf-8") as file:
            lines = [(line, json.loads(line)["group"]) for line in file]
        yield from (line for line, group in lines if group not in answered)
        answered.update(group for _, group in lines)


if __name__ == "__main__":
    sys.stdout.writelines(slowest_right(sys.argv[1:]))
