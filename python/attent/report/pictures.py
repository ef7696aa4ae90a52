"""A small picture as text for the page: a PNG inside a ``data:`` address."""

from __future__ import annotations

import struct
import zlib
from base64 import b64encode

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .._checks import describe, refuse

SIDE = 64  # pixels; larger pictures are shrunk


def as_data_uri(image: Tensor) -> str:
    """``image`` ``[H, W]``, ``[1, H, W]`` or ``[3, H, W]``, uint8 or floats from 0 (black) to 1, as an address.

    Raises:
        ValueError: it has another shape.

    >>> from attent.report.pictures import as_data_uri
    >>> as_data_uri(torch.zeros(2, 2))[:22]
    'data:image/png;base64,'
    """
    takes = "an image [H, W], [1, H, W] or [3, H, W]"
    if not isinstance(image, Tensor) or image.dim() not in (2, 3) or 0 in image.shape:
        refuse("picture", f"one that returns {describe(image)}", takes)
    planes = image.detach().cpu()[None] if image.dim() == 2 else image.detach().cpu()
    if planes.shape[0] not in (1, 3):
        refuse("picture", f"one that returns {describe(image)}", takes)
    values = planes.float() / 255 if planes.dtype == torch.uint8 else planes.float()
    longest = max(values.shape[1:])
    if longest > SIDE:
        size = [max(round(length * SIDE / longest), 1) for length in values.shape[1:]]
        values = interpolate(values[None], size=size, mode="area")[0]
    pixels = (values.nan_to_num().clamp(0, 1) * 255 + 0.5).to(torch.uint8).permute(1, 2, 0).contiguous()  # [H, W, C]
    height, width, channels = pixels.shape
    # Each row begins with the number of its filter: 0, none (PNG specification, section 9).
    rows = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), pixels.view(height, -1)], 1)
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    body = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(bytes(rows.flatten().tolist()), 9))
    png = b"\x89PNG\r\n\x1a\n" + body + _chunk(b"IEND", b"")
    return f"data:image/png;base64,{b64encode(png).decode()}"


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
