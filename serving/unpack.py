"""From the bytes as they were sent to a file, within limits that count real bytes, not headers."""

from __future__ import annotations

import os
from pathlib import Path

import zstandard

from lvseg.errors import InputError

PIECE_BYTES = 1024 * 1024
WINDOW_BYTES_MAX = 8 * 1024 * 1024  # of zstd: a longer window is memory that a sender would make us take


def decompress(source: Path, destination: Path, content_bytes: int, name: str) -> None:
    """Unpacks one zstd stream, writing no byte more than was announced.

    Args:
        source: the upload.
        destination: file to write.
        content_bytes: the announced size, which the caller has checked against the server's limit.
        name: of the scan, for messages.

    Raises:
        InputError: DECOMPRESS_LIMIT, INPUT_TRUNCATED or INPUT_CORRUPT.
    """
    unpacker = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES_MAX)
    written = 0
    with source.open("rb") as packed, destination.open("wb") as unpacked:
        try:
            # Across frames: what follows the first frame is then an error or is counted, never dropped.
            with unpacker.stream_reader(packed, read_across_frames=True, closefd=False) as reader:
                while piece := reader.read(PIECE_BYTES):
                    written += len(piece)
                    if written > content_bytes:
                        raise InputError(
                            "DECOMPRESS_LIMIT",
                            f"Expected the announced {content_bytes} bytes after zstd, received more in {name}.",
                        )
                    unpacked.write(piece)
        except zstandard.ZstdError as error:
            code = "DECOMPRESS_LIMIT" if "memory" in str(error) else "INPUT_CORRUPT"
            raise InputError(code, f"Expected a sound zstd stream, received one with '{error}' in {name}.") from error
    if written < content_bytes:
        raise InputError(
            "INPUT_TRUNCATED",
            f"Expected the announced {content_bytes} bytes after zstd, received {written} bytes in {name}.",
        )


def link(source: Path, destination: Path) -> None:
    """The same file under a second name, so that a second attempt finds the upload as it came."""
    os.link(source, destination)
