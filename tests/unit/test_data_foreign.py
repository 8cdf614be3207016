"""The labelled path for plain tar files: reads them, keeps ranks in step, refuses to resume."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch

from data.config import DataConfig
from data.errors import DataError
from data.foreign import ForeignStream
from data.ledger import add_hashes, format_hash
from data.plain_tars import plain_tars

TEXTS = [f"document {number} " + "x" * number for number in range(40)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for shard in range(4):
        with tarfile.open(tmp_path / f"foreign-{shard}.tar", "w") as tar:
            for number in range(shard * 10, shard * 10 + 10):
                name, text = f"{number:03d}.txt", TEXTS[number].encode()
                if number % 2:
                    name, text = f"{number:03d}.json", json.dumps({"text": TEXTS[number]}).encode()
                for member, payload in ((name, text), (f"x{number:03d}.png", b"\x89PNG")):
                    info = tarfile.TarInfo(member)
                    info.size = len(payload)
                    tar.addfile(info, io.BytesIO(payload))
    return tmp_path


def config(folder: Path, **changes: object) -> DataConfig:
    given: dict = {"path": str(folder), "mode": "stream", "seq_len": 20, **changes}
    return DataConfig(**given)


def test_reads_the_texts_in_order_round_and_round(folder: Path) -> None:
    expected = [256]
    for text in TEXTS * 3:
        expected += [*text.encode(), 256]
    with ForeignStream(config(folder), 0, 1, 4, 2) as stream:
        n_steps = 2 * len("".join(TEXTS)) // 80
        rows = [micro for step in range(n_steps) for micro in stream.read(step)]
        assert (stream.n_documents, stream.n_left_out) == (40, 40)
        news = stream.news()
        assert news and news["left_out_by_reason"] == {"members .png": 40} and "40 documents" in news["cause"]
        assert stream.news() is None and stream.news(last=True) is None  # it is told once
    tokens = torch.cat([micro.tokens.flatten() for micro in rows]).tolist()
    targets = torch.cat([micro.targets.flatten() for micro in rows]).tolist()
    assert tokens == expected[: len(tokens)] and targets == expected[1 : len(targets) + 1]
    for micro in rows:
        assert micro.loss_mask.all() and not micro.doc_ids[:, 0].any()
        assert torch.equal(torch.diff(micro.doc_ids, dim=1).bool(), micro.tokens[:, 1:] == 256)


def test_ranks_share_the_samples_and_stay_in_step(folder: Path) -> None:
    seen: set[str] = set()
    total = 0
    for rank in range(2):
        with ForeignStream(config(folder), rank, 2, 4, 2) as stream:
            micro_batches = [stream.read(step)[0] for step in range(30)]
            total = add_hashes(total, stream.consumed_hash(29))
            assert stream.ledger_line(29, total)["plan"] == "not resumable"
            text = bytes(t for m in micro_batches for t in m.tokens.flatten().tolist() if t < 256).decode()
            seen |= {f"rank {rank}: {number}" for number in range(40) if f"document {number} " in text}
            expected_hash = stream.ledger_hash(29)
    assert format_hash(total) == expected_hash
    numbers = [int(name.split(": ")[1]) for name in seen]
    assert sorted(numbers) == list(range(40))


def test_it_cannot_be_resumed_and_says_so(folder: Path) -> None:
    with ForeignStream(config(folder), 0, 1, 4, 4) as stream:
        stream.read(0)
        with pytest.raises(DataError, match="cannot be resumed"):
            stream.read(5)
        with pytest.raises(DataError, match="cannot be resumed at step 1"):
            stream.check_cursor(stream.cursor(1))


def test_an_end_token_inside_a_document_is_named(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "[SEP]": 1, "document": 2}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.save(str(folder / "words.json"))
    text = b"first [SEP] second"
    with tarfile.open(folder / "foreign-2.tar", "a") as tar:
        info = tarfile.TarInfo("broken.txt")
        info.size = len(text)
        tar.addfile(info, io.BytesIO(text))
    with (
        ForeignStream(config(folder, tokenizer=str(folder / "words.json")), 0, 1, 4, 4) as stream,
        pytest.raises(
            DataError, match=r"foreign-2\.tar: broken\.txt: its tokens hold the end-of-document token 1 of words"
        ),
    ):
        for step in range(3):
            stream.read(step)


def test_refusals(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tar file"):
        plain_tars(str(tmp_path / "none"))
    assert len(plain_tars(str(folder / "foreign-[12].tar"))[0]) == 2
    with pytest.raises(DataError, match="micro-batches"):
        ForeignStream(config(folder), 0, 1, 4, 3)
    with pytest.raises(DataError, match="cannot be read"):
        ForeignStream(config(folder, tokenizer="none.json"), 0, 1, 4, 4)
    with tarfile.open(tmp_path / "only.tar", "w") as tar:
        info = tarfile.TarInfo("a.bin")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    with (
        ForeignStream(config(tmp_path / "only.tar"), 0, 1, 4, 4) as stream,
        pytest.raises(DataError, match="no sample has a member txt"),
    ):
        stream.read(0)
