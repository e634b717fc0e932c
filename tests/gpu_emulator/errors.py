"""What the emulator reports."""


class Defect(Exception):
    """The program did something that a GPU leaves undefined: an access out of bounds, a race, a divergent barrier."""


class Unsupported(Exception):
    """The program uses an instruction, or a form of one, that the emulator does not know."""
