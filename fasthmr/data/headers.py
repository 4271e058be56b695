"""What an encoded image says about itself: its shape, from the header, so that no damaged one is ever unpacked."""

from __future__ import annotations

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}  # by PNG's colour type
_JPEG_FRAME_MARKERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # the three define tables, not frames


def image_shape(encoded: bytes) -> tuple[int, ...]:
    """Shape that a JPEG or PNG will have when decoded: (H,W) with one channel, else (H,W,C); px.

    Reading it takes microseconds, so every image is checked whenever a clip is read, not only the few that are decoded.

    Raises:
        ValueError: the header is damaged, or of another format or depth.
    """
    if encoded.startswith(_PNG) and len(encoded) > 25 and encoded[12:16] == b"IHDR":
        width, height = int.from_bytes(encoded[16:20]), int.from_bytes(encoded[20:24])
        depth, channels = encoded[24], _PNG_CHANNELS.get(encoded[25], 0)
    elif encoded.startswith(b"\xff\xd8"):
        height, width, depth, channels = _jpeg_frame(encoded)
    else:
        raise ValueError(f"is neither a JPEG nor a PNG, it begins with {encoded[:4].hex(' ') or 'nothing'}")
    if depth != 8 or channels == 0:
        raise ValueError(f"must have 8 bits a channel and a known colour type, got {depth} bits, {channels} channels")
    return (height, width) if channels == 1 else (height, width, channels)


def _jpeg_frame(encoded: bytes) -> tuple[int, int, int, int]:
    """(height, width, bits, channels) of a JPEG: hops over its segments to the one that opens the frame."""
    at = 2
    while at + 10 <= len(encoded) and encoded[at] == 0xFF:
        if encoded[at + 1] in _JPEG_FRAME_MARKERS:
            bits, channels = encoded[at + 4], encoded[at + 9]
            return int.from_bytes(encoded[at + 5 : at + 7]), int.from_bytes(encoded[at + 7 : at + 9]), bits, channels
        at += 2 + int.from_bytes(encoded[at + 2 : at + 4])
    raise ValueError("is a JPEG with a damaged header")
