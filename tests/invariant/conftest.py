import json
import os
import random
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from tests.conftest import random_model
from tests.models.block_causal import make_checkpoint
from tests.training.test_trainer import make_trajectories


def launch(folder, commands, processes=1, **environment):
    """Runs command lines in that many processes; see worker.py."""
    path = folder / f"commands-{processes}.json"
    path.write_text(json.dumps(commands))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [*launcher, "-m", "tests.invariant.worker", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-8000:]
    return result.stdout


def logs(folder):
    """What the last checkpoint of a run has logged, a dict a step."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    return [log for log in json.loads((last / "trainer_state.json").read_text())["log_history"] if "loss" in log]


def weights(folder):
    """What a run has saved at its end: the model, or its adapter."""
    [path] = [*folder.glob("model.safetensors"), *folder.glob("adapter_model.safetensors")]
    return load_file(path)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Three models, and `t.jsonl` with 22 trajectories: batches of 12 come out uneven.

    `tied` and `untied` have full attention, `blocks` is a block-causal mixture of experts.
    """
    folder = tmp_path_factory.mktemp("inputs")
    for name in ("tied", "untied"):
        diffusion_model = random_model(3, tie_word_embeddings=name == "tied")
        diffusion_model.model.save_pretrained(folder / name)
        diffusion_model.tokenizer.save_pretrained(folder / name)
    make_checkpoint(folder / "blocks", "sdar_moe")
    records = (t.to_record() for t in make_trajectories(random.Random(7), count=22))
    (folder / "t.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder
