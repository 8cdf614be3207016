"""Our safetensors files and the package's are the same files."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from parallel.safetensors_file import SafetensorsReader, sha256, write

TENSORS = {
    "matrix": torch.randn(5, 7),
    "half": torch.randn(9).to(torch.bfloat16),
    "empty": torch.zeros(0),
    "integers": torch.arange(6).view(2, 3),
}


def test_the_package_reads_ours(tmp_path) -> None:
    entry = write(tmp_path / "a.safetensors", TENSORS.items())
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[key], tensor) for key, tensor in TENSORS.items())
    content = (tmp_path / "a.safetensors").read_bytes()
    assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert sha256(tmp_path / "a.safetensors") == entry["sha256"]


def test_we_read_the_packages(tmp_path) -> None:
    save_file(TENSORS, tmp_path / "b.safetensors", metadata={"format": "pt"})
    reader = SafetensorsReader(tmp_path / "b.safetensors")
    assert torch.equal(reader.flat_slice("matrix", 3, 20), TENSORS["matrix"].flatten()[3:20])
    assert torch.equal(reader.flat_slice("half", 0, 9), TENSORS["half"])
    assert reader.flat_slice("empty", 0, 0).numel() == 0


def test_a_foreign_file_is_refused(tmp_path) -> None:
    (tmp_path / "c").write_bytes(b"\x80\x04\x95 this is a pickle, or might be one")
    with pytest.raises(ValueError, match="not a safetensors file"):
        SafetensorsReader(tmp_path / "c")


def test_an_existing_file_is_not_overwritten(tmp_path) -> None:
    (tmp_path / "d").write_text("mine")
    with pytest.raises(FileExistsError):
        write(tmp_path / "d", TENSORS.items())
    assert (tmp_path / "d").read_text() == "mine"
