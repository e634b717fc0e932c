import pytest

from tabom import make_verifier


@pytest.fixture(scope="session")
def verifier():
    """The verifier of mathematics; a session shares its one process, because starting it takes longer than a table."""
    return make_verifier("math", timeout=30, workers=1)
