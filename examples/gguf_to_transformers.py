"""Turns a GGUF file into a folder of transformers, with the tokenizer and the chat template, in float32:

    python examples/gguf_to_transformers.py MODEL.gguf FOLDER

The weights of a GGUF file are quantized, and transformers neither trains nor saves quantized weights. This script
dequantizes them. It needs the package `gguf`.
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def convert(source: Path, folder: Path) -> None:
    """Reads the GGUF file `source` and writes config, weights, tokenizer and chat template to `folder`."""
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/gguf_to_transformers.py MODEL.gguf FOLDER")
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
