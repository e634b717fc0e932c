"""Inputs that have broken losses before, beside Gaussian ones."""

import math

import torch


def gaussian(rows, columns):
    return torch.randn(rows, columns, dtype=torch.float64) * 3


def all_equal(rows, columns):
    return torch.full((rows, columns), 0.7, dtype=torch.float64)


def peaked(rows, columns):
    """One column with p = 0.999999."""
    logits = torch.zeros(rows, columns, dtype=torch.float64)
    best = torch.randint(columns, (rows, 1))
    return logits.scatter_(1, best, math.log(0.999999 / 1e-6 * max(columns - 1, 1)))


def low_with_one_high(rows, columns):
    """All about -20 and one at +2: a running maximum that starts at 0, or padding with 0, goes wrong here."""
    logits = -20 + 0.1 * torch.randn(rows, columns, dtype=torch.float64)
    return logits.scatter_(1, torch.randint(columns, (rows, 1)), 2.0)


def huge(rows, columns):
    return 1e4 * (2 * torch.randint(2, (rows, columns)) - 1) + torch.randn(rows, columns, dtype=torch.float64)


def with_minus_infinity(rows, columns):
    logits = gaussian(rows, columns).masked_fill(torch.rand(rows, columns) < 0.4, -torch.inf)
    logits[:, 0] = 1.0
    return logits


VALUES = [gaussian, all_equal, peaked, low_with_one_high, huge, with_minus_infinity]
SHAPES = [(0, 7), (1, 1), (7, 1), (7, 2), (257, 31), (7, 1000)]
VOCABULARIES = [(1, 126464), (1, 151936), (2, 152064)]


def cases(shapes=SHAPES):
    """(values, rows, columns): all values in small shapes, two in those of real vocabularies, which test size."""
    small = [(values, *shape) for values in VALUES for shape in shapes]
    return small + [(values, *shape) for values in (gaussian, with_minus_infinity) for shape in VOCABULARIES]


def draw_labels(logits, ignored=0.3):
    """Labels on columns above -inf, some rows ignored."""
    probability = logits.double().isfinite().double()
    labels = torch.multinomial(probability, 1).squeeze(1) if len(logits) else torch.zeros(0, dtype=torch.int64)
    return labels.masked_fill(torch.rand(len(logits)) < ignored, -100)


def draw_sequences(lengths, last_step=5, unranked=0.2):
    """Steps with ties and -1, and the row offsets."""
    rows = sum(lengths)
    steps = torch.randint(0, last_step + 1, (rows,)).masked_fill(torch.rand(rows) < unranked, -1)
    return steps, torch.tensor([0, *lengths]).cumsum(0).int()


def split_rows(rows):
    """Lengths that add up to `rows`, an empty one among them."""
    first = rows // 3
    return [first, 0, rows - first]
