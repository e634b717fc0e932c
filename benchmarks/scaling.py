"""How time and memory of the whole loss grow with rows, vocabulary, window and sequences.

    python -m benchmarks.scaling

One quantity varies at a time around one base shape. Writes benchmarks/results/scaling-<device>.json;
`python -m benchmarks.tools.pictures` draws it.
"""

import sys

import torch

from benchmarks.loss import Shape, add_peers, machine, measure
from benchmarks.tools.measure import environment, is_gpu, result_name, write_json

CONTENDERS = ["authors' way", "reference", "checkpoint", "Liger CE + entropy", "ours, logits", "ours, fused"]


def sweeps(length: int, window: int, width: int, on_gpu: bool) -> dict[str, list[Shape]]:
    """Shapes by the quantity that varies; on a CPU the other ones are small."""
    base = Shape(8, length, window, width, 152064) if on_gpu else Shape(4, length, window, width, 32000)
    vocabularies = (8192, 32000, 65536, 126464, 152064)
    windows = [w for w in (4, 8, 16, 32, 64, 128, 256) if w <= length]
    sequences = (1, 4, 16, 64, 128) if on_gpu else (1, 2, 4, 8, 16, 32)
    return {
        "vocabulary": [base._replace(vocabulary=v) for v in vocabularies],
        "window": [base._replace(window=w) for w in windows],
        "sequences": [base._replace(sequences=n) for n in sequences],
    }


def main() -> None:
    """Measure every sweep."""
    torch.manual_seed(0)
    device, memory, rounds, sizes = machine()
    add_peers(device)
    records = []
    for quantity, shapes in sweeps(*sizes, on_gpu=is_gpu(device)).items():
        for shape in shapes:
            print(f"{quantity}: {shape}", file=sys.stderr, flush=True)
            figures = measure(shape, device, rounds, memory, CONTENDERS)
            records += [{"sweep": quantity, **figure} for figure in figures]
            path = write_json(result_name("scaling", device), environment(device) | {"figures": records})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
