"""What a tar file of somebody else may hold: regular files under plain relative names, and nothing that leads out."""

from __future__ import annotations

REGULAR = frozenset((b"0", b"\0", b"7"))  # a header's type, also of old and of contiguous files
KINDS = {b"1": "hard link", b"2": "symbolic link", b"3": "device", b"4": "device", b"5": "folder", b"6": "pipe"}
KINDS |= {b"S": "sparse file", b"M": "part of a file that goes on in another archive"}


def leads_out(name: str) -> bool:
    """Whether a member of this name, if it were unpacked, would lie outside of the folder; backslashes count."""
    parts = name.replace("\\", "/").split("/")
    return name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0] or "\0" in name


def member_problem(name: str, kind: bytes) -> str:
    """Why a member is refused, "" where it is not.

    Args:
        kind: the type byte of its header.
    """
    if kind not in REGULAR and kind != b"5":
        return f"holds the {KINDS.get(kind, 'member of an unknown kind')} {name!r}; a shard holds regular files only"
    if leads_out(name):
        return f"holds a member whose name leads out of the folder, {name!r}; never extract it"
    return ""
