"""The files of recipes/accelerate, read by accelerate's own reader into the environment that its launcher sets."""

import argparse
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

import tabom
from tabom.cli.main import main

CONFIGS = sorted((Path(tabom.__file__).parent / "recipes" / "accelerate").glob("*.yaml"))


def test_there_is_one_for_every_way():
    assert [path.stem for path in CONFIGS] == ["ddp", "deepspeed_zero3", "fsdp2"]


def test_a_command_says_where_they_are(capsys):
    for path in [*CONFIGS, CONFIGS[0].parents[1] / "dream_prm12k.yaml"]:
        assert main(["recipe", path.stem]) == 0
        assert capsys.readouterr().out == f"{path}\n"
    assert main(["recipe"]) == 0
    assert set(map(str, CONFIGS)) < set(capsys.readouterr().out.splitlines())
    assert main(["recipe", "fsdp"]) == 2
    assert "name=fsdp: no such file; did you mean 'fsdp2'?" in capsys.readouterr().err


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_it(path):
    assert load_config_from_file(str(path)).num_processes == 8
    assert "-m tabom train" in path.read_text()


def test_fsdp2_shards_the_layers_of_the_model(monkeypatch):
    [path] = [path for path in CONFIGS if path.stem == "fsdp2"]
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "-m", "tabom"])
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    arguments, _, _ = _validate_launch_command(arguments)
    assert isinstance(arguments, argparse.Namespace) and arguments.use_fsdp
    for name, value in prepare_multi_gpu_env(arguments).items():
        if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP")):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.activation_checkpointing) == (2, True, True)
    assert "SHARDED" in str(plugin.state_dict_type)
    assert yaml.safe_load(path.read_text())["mixed_precision"] == "bf16"
