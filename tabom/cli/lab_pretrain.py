"""`tabom lab pretrain`: makes the shipped models from nothing."""

from tabom.lab.config import PretrainConfig
from tabom.lab.pretrain import pretrain


def run(config: PretrainConfig) -> None:
    """Trains and saves."""
    print(f"saved to {pretrain(config)}")
