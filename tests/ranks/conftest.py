"""Data for the contract of balance."""

import random
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def contract_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen documents of made-up words, the same in every run, packed as bytes."""
    from data.pack import pack

    folder = tmp_path_factory.mktemp("contract")
    draw = random.Random(4)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(1, 9))) for _ in range(300)]
    texts = folder / "texts"
    texts.mkdir()
    for number in range(12):
        (texts / f"{number:02d}.txt").write_text(" ".join(draw.choices(words, k=600)))
    pack([str(texts)], folder / "packed", tokenizer="bytes", heldout_kib=2)
    return folder / "packed"
