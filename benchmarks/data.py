"""What the training data costs a rank: parsed and tokenized in memory, tokenized into the cache, found in the cache.

    python -m benchmarks.data [RECORDS]

Each way in a process of its own, one after the other, on the same made-up file: prompts of 120 characters in a chat
template, 256 response tokens. Prints wall and CPU seconds, memory that the process took for itself (resident,
anonymous), and the CPU time to read one example afterwards, in random order.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LENGTH = 256
WAYS = ("in memory", "first run", "later run, other ranks")


def make_up(path: Path, count: int) -> None:
    """Writes that many records."""
    rng = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            record = {"prompt": "".join(rng.choices("0123456789", k=120)), "response": "1" * LENGTH}
            record["response_token_ids"] = rng.choices(range(4, 40), k=LENGTH)
            record["decoding_order"] = rng.sample(range(LENGTH), LENGTH)
            file.write(json.dumps(record) + "\n")


def anonymous_memory() -> int:
    """KiB of this process that no file backs."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1])


def get_ready(way: str, path: str) -> Callable[[], Sequence[Any]]:
    """The work to be timed: until examples can be made."""
    from tabom.data.encoding import encode_prompt
    from tabom.data.tokenized import tokenize
    from tabom.data.trajectories import read_trajectories
    from tabom.lab.model import character_tokenizer

    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}={{ m.content }}.{% endfor %}"
    if way != "in memory":
        return lambda: tokenize(path, tokenizer, len(tokenizer))[0]

    def read() -> Sequence[Any]:
        trajectories, _ = read_trajectories(path, tokenizer, len(tokenizer))
        return [(encode_prompt(tokenizer, trajectory.prompt), trajectory) for trajectory in trajectories]

    return read


def measure(way: str, path: str) -> None:
    """Prints a row of the table."""
    work = get_ready(way, path)
    memory, wall, cpu = anonymous_memory(), time.perf_counter(), time.process_time()
    data = work()
    wall, cpu, memory = time.perf_counter() - wall, time.process_time() - cpu, anonymous_memory() - memory
    indices = random.Random(1).choices(range(len(data)), k=2000)
    reading = time.process_time()
    for index in indices:
        data[index]
    reading = (time.process_time() - reading) / len(indices)
    print(f"| {way} | {wall:.1f} | {cpu:.1f} | {memory / 1024:.0f} | {reading * 1e6:.0f} |", flush=True)


def main() -> None:
    """Measure all ways."""
    if len(sys.argv) == 3:
        measure(*sys.argv[1:])
        return
    count = int(sys.argv[1]) if len(sys.argv) == 2 else 100_000
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "t.jsonl")
        make_up(path, count)
        print(f"{count} records, {path.stat().st_size >> 20} MiB\n")
        print("| | wall, s | CPU, s | memory, MiB | an example, µs |\n| --- | ---: | ---: | ---: | ---: |", flush=True)
        environment = {**os.environ, "HF_DATASETS_CACHE": folder, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        for way in WAYS:
            subprocess.run([sys.executable, "-m", "benchmarks.data", way, str(path)], env=environment, check=True)


if __name__ == "__main__":
    main()
