"""Walking a tar file header by header, stricter than tarfile: it says where and why the chain of members breaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

BLOCK = 512


@dataclass(frozen=True)
class Member:
    """One tar member: its name, where its payload starts, the payload's size, and the type byte of its header."""

    name: str
    offset: int
    size: int
    kind: bytes = b"0"


@dataclass(frozen=True)
class Break:
    """Where the chain of headers ends otherwise than it should: a byte offset and the reason."""

    offset: int
    problem: str


def parse_header(block: bytes) -> Member | str:
    """The member that a header block of 512 bytes describes (offset 0), or what is wrong with it."""
    if len(block) < BLOCK:
        return "the file ends inside a tar header"
    stored = _octal(block[148:156])
    if stored != sum(block) - sum(block[148:156]) + 8 * 0x20:
        return "the tar header is damaged (wrong checksum)"
    size = _octal(block[124:136])
    if size is None:
        return "the tar header is damaged (no size)"
    name = block[:100].split(b"\0", 1)[0]
    prefix = block[345:500].split(b"\0", 1)[0] if block[257:262] == b"ustar" else b""
    full = prefix + b"/" + name if prefix else name
    return Member(full.decode("utf-8", errors="replace"), 0, size, block[156:157])


def walk(read: Callable[[int, int], bytes], file_bytes: int) -> Iterator[Member | Break]:
    """Yields the members in order; at most one Break, as the last item, if the archive does not end as it should.

    Args:
        read: read(offset, nbytes) -> bytes, shorter at the end of the file.
        file_bytes: size of the file.
    """
    at = 0
    while True:
        if at >= file_bytes:
            yield Break(at, "the file ends without the archive's closing blocks")
            return
        block = read(at, BLOCK)
        if block == bytes(BLOCK):
            if read(at + BLOCK, BLOCK) != bytes(BLOCK):
                yield Break(at, "the archive's closing blocks are incomplete")
            elif any(read(at + 2 * BLOCK, file_bytes)):
                yield Break(at, "the archive is closed here, but data follows that tar readers do not see")
            return
        member = parse_header(block)
        if isinstance(member, str):
            yield Break(at, member)
            return
        if at + BLOCK + member.size > file_bytes:
            yield Break(at, f"the file ends inside the member {member.name}")
            return
        yield Member(member.name, at + BLOCK, member.size, member.kind)
        at += BLOCK + member.size + -member.size % BLOCK


def _octal(field: bytes) -> int | None:
    text = field.strip(b"\0 ")
    try:
        return int(text, 8)
    except ValueError:
        return None
