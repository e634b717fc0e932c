"""The emulator's own tests see what they do not write."""

import pytest


@pytest.fixture(autouse=True)
def unwritten_memory_shows(marked_memory: None) -> None:
    """For every test."""
