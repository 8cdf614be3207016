"""The same random numbers for each test, whichever ran before it in the same process."""

import sys

import pytest


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Seeds torch where a test's module has imported it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
