"""Read the text of four Austen novels out of the Debian package r-cran-janeaustenr, without R.

The package holds an R lazy-load database, `Rdata.rdb`: a row of objects, each its unpacked length (4 bytes, big-endian)
and then either a zlib stream, or one type byte and a bz2 or raw LZMA2 stream. A novel is a character vector, one
element a line, in R's XDR serialisation (R Internals, section 1.8).
"""

from __future__ import annotations

import bz2
import lzma
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

__all__ = ["NOVELS", "read_novels"]

NOVELS = ("emma", "mansfield_park", "pride_and_prejudice", "sense_and_sensibility")

_STRING_VECTOR = b"\x00\x00\x00\x10"  # STRSXP, type 16
_STRING = 9  # CHARSXP, the low byte of an element's flags
_NOVEL_LINES = 1000  # the database also holds documentation and indices, all far shorter


def read_novels(database: Path) -> dict[str, str]:
    """Return the novels by slug, such as `emma`, with one newline between the lines of the printed text.

    Raises:
        ValueError: the file is no such database, or a novel is missing.
    """
    texts: dict[str, str] = {}
    for raw in _objects(database.read_bytes()):
        lines = _strings(raw)
        if len(lines) > _NOVEL_LINES:
            text = "\n".join(lines)
            title = text.strip().split("\n", 1)[0]
            texts[re.sub("[^a-z]+", "_", title.lower()).strip("_")] = text
    missing = [name for name in NOVELS if name not in texts]
    if missing:
        raise ValueError(f"{database} lacks {', '.join(missing)}; it has {', '.join(sorted(texts)) or 'no novel'}")
    return {name: texts[name] for name in NOVELS}


def _objects(blob: bytes) -> Iterator[bytes]:
    while len(blob) > 5:
        raw, blob = _unpack(blob)
        yield raw


def _unpack(blob: bytes) -> tuple[bytes, bytes]:
    """Return the first object, unpacked, and what follows it."""
    (size,) = struct.unpack(">I", blob[:4])
    inflate = zlib.decompressobj()
    try:
        raw = inflate.decompress(blob[4:])
        if len(raw) == size:
            return raw, inflate.unused_data
    except zlib.error:
        pass  # the byte after the length then is R's type byte: '2' bz2, 'Z' xz
    kind = blob[4:5]
    stream = bz2.BZ2Decompressor() if kind == b"2" else _lzma2()
    raw = stream.decompress(blob[5:])
    if len(raw) != size:
        raise ValueError(f"an object of type {kind!r} unpacks to {len(raw)} bytes instead of {size}")
    return raw, stream.unused_data


def _lzma2() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6}])


def _strings(raw: bytes) -> list[str]:
    """Return the elements of the first character vector in `raw`; empty where there is none."""
    at = raw.find(_STRING_VECTOR)
    if at < 0 or at + 8 > len(raw):
        return []
    (count,) = struct.unpack(">i", raw[at + 4 : at + 8])
    at += 8
    lines: list[str] = []
    for _ in range(count):
        if at + 8 > len(raw):
            return []
        flags, length = struct.unpack(">Ii", raw[at : at + 8])
        if flags & 0xFF != _STRING:
            return []  # the four bytes were something else
        at += 8
        lines.append(raw[at : at + max(length, 0)].decode("utf-8", "replace"))  # length -1 is NA
        at += max(length, 0)
    return lines
