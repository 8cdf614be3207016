"""Finds the commands that README.md and docs/ print: indented lines and inline code."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_FIRST = re.compile(
    r"(\$ )?(\.venv/bin/|launch/jobs/|trimtab |make |python |python3 |mpirun |sbatch |srun |kubectl |pip |ray |export |"
    r"tensorboard |lm_eval |docker |source |for |done\b)"
)


@dataclass(frozen=True)
class Printed:
    """One command as printed: its page, line number (1-based), and the words without comment."""

    page: str
    line: int
    words: tuple[str, ...]
    block: bool = True

    @property
    def trimtab(self) -> tuple[str, ...]:
        """The words behind `trimtab`; empty where it is another program."""
        names = [place for place, word in enumerate(self.words) if word.rpartition("/")[2] == "trimtab"]
        return self.words[names[0] + 1 :] if names else ()

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {shlex.join(self.words)}"


def printed() -> Iterator[Printed]:
    """Every command of every page, in order."""
    for path in PAGES:
        page = str(path.relative_to(ROOT))
        lines = path.read_text(encoding="utf-8").splitlines()
        number = 0
        while number < len(lines):
            start, text = number, lines[number]
            for code in re.findall(r"`(trimtab [^`]+)`", text):
                yield Printed(page, start + 1, tuple(shlex.split(code)), block=False)
            if text.startswith("    ") and _FIRST.match(text.strip()):
                text = text.strip()
                while number + 1 < len(lines) and (text.endswith("\\") or text.count("[") > text.count("]")):
                    number += 1
                    text = f"{text.removesuffix(chr(92)).rstrip()} {lines[number].strip()}"
                if re.match(r"trimtab .*  +[a-z]", text):  # a table of commands: the meaning stands behind
                    text = re.split(r"  +", text)[0]
                yield Printed(page, start + 1, tuple(shlex.split(text.removeprefix("$ "), comments=True)))
            number += 1


def without_placeholders(words: tuple[str, ...]) -> list[str]:
    """`[--step N]` loses its brackets, `a|b` becomes a, RUN and N become a name and a number."""
    known = {
        "N": "1", "STEPS": "0", "RUN": "runs/debug", "RUN...": "runs/debug", "KEY": "optimizer.lr", "DIR": "exported",
        "CONFIG": "debug", "FILE": "tokenizer.json", "PRESET|FILE": "debug", "bf16|fp32": "bf16", "...": "",
    }  # fmt: skip
    found = [word.strip("[]") if word.startswith("[") or word.endswith("]") else word for word in words]
    found = [known.get(word, word) for word in found]
    return [word for word in found if word and word != "key.path=value"]
