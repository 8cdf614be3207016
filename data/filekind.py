"""What a file holds, told by its name and its first bytes: text, rows of text, or a form that is not read."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

HEAD = 4096  # bytes that are looked at to tell a file's kind
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bzip2", ".xz": "xz"}
_ROWS = {
    ".jsonl": "jsonl", ".jsonlines": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet",
    ".pq": "parquet",
}  # fmt: skip

_COMPRESSION_MAGIC = (
    (re.compile(rb"\x1f\x8b\x08"), "gzip"),
    (re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), "zstd"),  # a frame, or a frame to skip before it
    (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), "bzip2"),
    (re.compile(rb"\xfd7zXZ\0"), "xz"),
)
_CONTAINER_MAGIC = (
    (b"PK\x03\x04", "zip archive"),
    (b"PK\x05\x06", "zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "7z archive"),
    (b"Rar!\x1a\x07", "rar archive"),
    (b"ARROW1", "Arrow file"),
    (b"\xff\xff\xff\xff", "Arrow stream"),
    (b"ORC", "ORC table"),
    (b"Obj\x01", "Avro file"),
    (b"%PDF-", "PDF document"),
    (b"SQLite format 3\0", "SQLite database"),
    (b"\x93NUMPY", "numpy array"),
    (b"\x89HDF\r\n", "HDF5 file"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "Office document"),
    (b"\x04\x22\x4d\x18", "lz4-compressed file"),
    (b"WARC/", "WARC archive"),
)
# Suffixes of what holds other files or rows in a form of its own; a file of such a name that is text is read as text.
_CONTAINER_SUFFIXES = {
    "zip": "zip archive", "tar": "tar archive", "tgz": "tar archive", "tbz": "tar archive", "tbz2": "tar archive",
    "txz": "tar archive", "tzst": "tar archive", "7z": "7z archive", "rar": "rar archive", "jar": "zip archive",
    "whl": "zip archive", "lz4": "lz4-compressed file", "br": "brotli-compressed file", "lzma": "lzma-compressed file",
    "snappy": "snappy-compressed file", "arrow": "Arrow file", "feather": "Arrow file", "ipc": "Arrow file",
    "orc": "ORC table", "avro": "Avro file", "pkl": "pickle", "pickle": "pickle", "pt": "torch file",
    "pth": "torch file", "safetensors": "safetensors file", "npy": "numpy array", "npz": "numpy arrays",
    "h5": "HDF5 file", "hdf5": "HDF5 file", "msgpack": "MessagePack file", "tfrecord": "TFRecord file",
    "mds": "MDS shard", "db": "database", "sqlite": "SQLite database", "sqlite3": "SQLite database",
    "mdb": "database", "pdf": "PDF document", "doc": "Office document", "docx": "Office document",
    "odt": "Office document", "xls": "Office document", "xlsx": "Office document", "ods": "Office document",
    "ppt": "Office document", "pptx": "Office document", "epub": "e-book", "mobi": "e-book", "djvu": "DjVu document",
    "warc": "WARC archive",
}  # fmt: skip
# Suffixes of pictures, sound, fonts and compiled programs, which hold no text to miss.
_MEDIA = frozenset([
    "png", "jpg", "jpeg", "gif", "bmp", "ico", "icns", "webp", "tif", "tiff", "avif", "heic", "psd", "xcf", "svgz",
    "mp3", "wav", "flac", "ogg", "oga", "opus", "m4a", "aac", "mid", "mp4", "m4v", "mkv", "webm", "avi", "mov",
    "wmv", "ttf", "otf", "woff", "woff2", "eot", "pyc", "pyo", "pyd", "so", "dll", "dylib", "exe", "o", "obj", "a",
    "lib", "class", "wasm", "elc", "mo", "gmo", "qm", "node", "ko", "bc", "pdb",
])  # fmt: skip
_ABOUT = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|(data|dataset|model)[_-]?card|dataset_infos?|dataset_dict|state|"
    r"_success|_(common_)?metadata|(md5|sha1|sha256|sha512)sums?|checksums?)([._-][a-z0-9_-]+)*",
    re.IGNORECASE,
)
_ABOUT_SUFFIXES = frozenset(["", ".md", ".txt", ".rst", ".json", ".yaml", ".yml", ".cff", ".bib", ".html"])


def _suffixes(name: str) -> tuple[str, str]:
    """The last suffix without a compression's, and the compression's ("" for none), both in small letters."""
    path = PurePosixPath(name.rpartition("/")[2])
    last = path.suffix.lower()
    if last in COMPRESSIONS:
        return PurePosixPath(path.stem).suffix.lower(), last
    return last, ""


def kind_of(name: str) -> str:
    """ "text", "jsonl", "json" or "parquet", from a file's name, with or without a compression's suffix."""
    return _ROWS.get(_suffixes(name)[0], "text")


def holds_rows(name: str) -> bool:
    """Whether a file's name says that it holds rows, and not one document; .json alone does not say it."""
    suffix, compressed = _suffixes(name)
    return suffix in _ROWS and (suffix != ".json" or bool(compressed))


def named_container(name: str) -> str:
    """What a file's name says it is, where that is a form that is not read; "" otherwise."""
    return _CONTAINER_SUFFIXES.get(_suffixes(name)[0].lstrip("."), "")


def is_media(name: str) -> bool:
    """Whether a file's name says that it is a picture, sound, a font or a compiled program."""
    return _suffixes(name)[0].lstrip(".") in _MEDIA


def is_about(name: str) -> bool:
    """Whether a file's name is that of a note on data: a README, a licence, a data card, checksums."""
    last = name.rpartition("/")[2]
    return bool(_ABOUT.fullmatch(last)) and PurePosixPath(last).suffix.lower() in _ABOUT_SUFFIXES


def compression_of(head: bytes) -> str:
    """The compression that a file's first bytes show; "" for none of those that are read."""
    return next((name for magic, name in _COMPRESSION_MAGIC if magic.match(head)), "")


def container_of(name: str, head: bytes) -> str:
    """What a file is whose form is not read, by its first bytes, or by its name where they are no text; else ""."""
    for magic, what in _CONTAINER_MAGIC:
        if head.startswith(magic):
            return what
    if head[257:262] == b"ustar":
        return "tar archive"
    return named_container(name) if not _begins_as_text(head) else ""


def _begins_as_text(head: bytes) -> bool:
    if b"\0" in head:
        return False
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return len(head) - error.start < 4 and len(head) >= HEAD  # a character that the head's end cuts
    return True
