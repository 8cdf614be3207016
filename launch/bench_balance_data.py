"""The data of `trimtab bench balance`: passages of Python's standard library, many of them held out.

Tokens of one document prefer the same experts, so that a held-out split of few long files says little about balance:
its max_vio is chance. Passages of some 2,000 characters are about as long as the documents of a web corpus; the other
passages of a held-out one's file may be in training.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from data.builtin import BUILTIN_CORPORA
from data.dataset import describe
from data.errors import DataError
from data.pack import pack

CORPUS, TOKENIZER = "python", "bpe:2048"
HELDOUT, HELDOUT_KIB = 0.3, 8192
AT_LEAST, AT_MOST = 1500, 3000  # characters of a passage


def prepare(given: Path | None, out: Path, say: Callable[[str], None]) -> str:
    """The folder of the packed data: the user's, or passages packed into `out` unless they are there.

    Raises:
        DataError: the user's folder is no dataset or has nothing held out, or `out` holds one of another kind.
    """
    if given is not None:
        if not describe(given).n_heldout:
            raise DataError(f"{given}: holds no held-out documents to compare on; pack it with --heldout 0.1 or so")
        return str(given.absolute())
    source = out / "passages.jsonl"
    if not source.is_file():
        unfinished = source.with_suffix(".unfinished")
        with unfinished.open("w", encoding="utf-8") as file:
            for _, path in BUILTIN_CORPORA[CORPUS].files():
                for text in passages(path.read_text(encoding="utf-8", errors="replace")):
                    file.write(json.dumps({"text": text}) + "\n")
        unfinished.replace(source)
    packed = pack([str(source)], out / "data", tokenizer=TOKENIZER, shard_mb=2, heldout=HELDOUT,
                  heldout_kib=HELDOUT_KIB, licence=BUILTIN_CORPORA[CORPUS].licence)  # fmt: skip
    say(str(packed))
    return str(packed.path.absolute())


def passages(text: str) -> Iterator[str]:
    """Cuts a file at line ends into passages that add up to it.

    A passage ends in front of the first line without indentation behind an empty one once it has AT_LEAST characters,
    which in Python is where a definition begins; else with the line that brings it to AT_MOST characters.
    """
    lines: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        begins = bool(lines) and not lines[-1].strip() and bool(line.strip()) and not line[0].isspace()
        if size >= AT_MOST or (size >= AT_LEAST and begins):
            yield "".join(lines)
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    if lines:
        yield "".join(lines)
