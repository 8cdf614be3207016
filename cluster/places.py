"""The line in which a rank says where it is: its format, for who writes it, reads it or watches it.

    GENERATION SECTION STEP TIME

e.g. `0 backward 17 1766000000.123456`, padded with blanks to one width so that one write replaces all of it. STEP is
1-based, 0 before the first; TIME is time.time(). The file is `rank-N.at` in the run's folder of logs.
"""

from pathlib import Path

from cluster.causes import Place

WIDTH = 80  # bytes, with the newline


def section_file(folder: Path, rank: int) -> Path:
    """The file of one rank in the run's folder of logs."""
    return folder / f"rank-{rank}.at"


def place_line(generation: int, section: str, step: int | None, at: float) -> bytes:
    """The line of a rank. at: time.time() seconds."""
    return (f"{generation} {section} {step or 0} {at:.6f}".ljust(WIDTH - 1) + "\n").encode()


def parse_line(text: str, generation: int) -> Place | None:
    """Where the rank is; None when the line is torn, or of a process of another generation."""
    try:
        told, section, step, at = text.split()
        return Place(section, int(step) or None, float(at)) if int(told) == generation else None
    except ValueError:
        return None
