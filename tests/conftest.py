"""Shared fixtures: a tiny random model in memory, a browser, and random numbers with a printed seed.

The seed of a test follows from its name, so that a run tells of the code and not of the draw. With
TABOM_TEST_SEED=fresh every test draws new numbers.
"""

import os
import random
import shutil
import tempfile
import zlib

import pytest
import torch
from hypothesis import settings

os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="tabom-")  # before `datasets` is imported

from transformers import LlamaForCausalLM

from tabom.lab.model import character_tokenizer, tiny_config
from tabom.models.diffusion_model import DiffusionModel, describe

pytest_plugins = ["tests.gpu_emulator.plugin"]

FRESH_SEEDS = os.environ.get("TABOM_TEST_SEED") == "fresh"

torch.set_num_threads(1)
settings.register_profile(  # without a deadline, because the first example may compile a kernel
    "tabom", deadline=None, derandomize=not FRESH_SEEDS
)
settings.load_profile("tabom")


def pytest_sessionfinish() -> None:
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture
def seed(request) -> int:
    """Printed when the test fails; TABOM_TEST_SEED replays one."""
    if FRESH_SEEDS:
        seed = random.SystemRandom().randrange(2**31)
    else:
        seed = int(os.environ.get("TABOM_TEST_SEED") or zlib.crc32(request.node.name.encode()) % 2**31)
    print(f"TABOM_TEST_SEED={seed}")
    return seed


@pytest.fixture
def rng(seed) -> random.Random:
    torch.manual_seed(seed)
    return random.Random(seed)


@pytest.fixture
def model(seed) -> DiffusionModel:
    return random_model(seed)


def random_model(seed: int, **changes) -> DiffusionModel:
    """Two layers of random weights, far from uniform so that certainties differ."""
    torch.manual_seed(seed)
    tokenizer = character_tokenizer()
    config = tiny_config(tokenizer)
    config.update({"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, **changes})
    network = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        network.lm_head.weight.mul_(20)
    network.generation_config.max_new_tokens = 6
    return describe(network, tokenizer)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
