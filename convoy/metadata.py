"""Removes metadata from image files, for those whose pixels are good but whose metadata keeps Pillow from reading them.

Only PNG, TIFF and AVIF need it: Pillow reads JPEG, WebP, GIF and others whatever their metadata contain.
"""

import re
import struct
import zlib

_MAX_CHUNKS = 100_000
"""Of a PNG file. A file of 64 MB has 8,000 if each holds 8 kB."""

# The tags that pixels depend on (TIFF 6.0, https://www.itu.int/itudoc/itu-t/com16/tiff-fx/docs/tiff6.pdf): size, bits,
# compression, photometry, strips, tiles, predictor, colour map, orientation, extra samples, JPEG tables and YCbCr.
_TIFF_TAGS = {*range(254, 260), 262, 266, 273, 274, *range(277, 280), 284, 292, 293, 317, 320, *range(322, 326)}
_TIFF_TAGS |= {332, 334, 338, 339, 347, *range(512, 522), *range(529, 533)}


def without_metadata(data: bytes) -> bytes | None:
    """Returns the file without its metadata, except a PNG's EXIF data that are intact and a TIFF's orientation.

    Args:
        data: the content of an image file of any format.

    Returns:
        The content of a file with the same pixels; None for formats other than PNG, TIFF and AVIF, and for a PNG of
        countless chunks.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _without_png_chunks(data)
    if data.startswith((b"II*\x00", b"MM\x00*")):
        return _without_tiff_tags(data)
    if data[4:8] == b"ftyp":
        # An item of a type that the decoder does not know is skipped (ISO/IEC 14496-12, 8.11.6).
        return re.sub(rb"(infe.{8,10}?)(?:Exif|mime)", rb"\1skip", data, flags=re.DOTALL)
    return None


def _without_png_chunks(data: bytes) -> bytes | None:
    """Leaves out ancillary chunks, whose names begin with a lower-case letter (https://www.w3.org/TR/png-3/)."""
    kept, position, num_chunks = [data[:8]], 8, 0
    while position < len(data):
        num_chunks += 1
        if num_chunks > _MAX_CHUNKS:
            return None
        length, name = int.from_bytes(data[position : position + 4]), data[position + 4 : position + 8]
        chunk = data[position : position + 12 + length]
        is_intact = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
        if not name[:1].islower() or name == b"tRNS" or (name == b"eXIf" and is_intact):
            kept.append(chunk)
        position += 12 + length
    return b"".join(kept)


def _without_tiff_tags(data: bytes) -> bytes | None:
    order = "<" if data.startswith(b"II") else ">"
    try:
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, start)
        tags = struct.iter_unpack(f"{order}H10s", data[start + 2 : start + 2 + 12 * count])
        kept = [struct.pack(f"{order}H10s", tag, value) for tag, value in tags if tag in _TIFF_TAGS]
    except struct.error:  # cut off
        return None
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)  # no further directory
    return data[:start] + directory + data[start + len(directory) :]
