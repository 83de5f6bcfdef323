"""The baseline JPEG encoder in NumPy: byte for byte the file that libjpeg-turbo, and so Pillow, writes.

Paper     Diffusion-4K section 3.1, Compression Ratio: raw bytes / bytes of the JPEG at quality 95
Mirrors   libjpeg-turbo's defaults, as Pillow uses them; tested byte for byte by tests/test_jpeg.py
Standard  ITU T.81: quantisation and Huffman tables in Annex K, zigzag in figure A.6
Shapes    R and C block rows and columns; an MCU is the blocks of one square: at 4:2:0 four of Y, one of Cb, one of Cr
Steps     RGB to YCbCr, chroma halved, 8x8 blocks, DCT, division by the table, zigzag, run lengths, Huffman codes
Run       python bench/speed.py jpeg
"""

from collections.abc import Iterator
from itertools import islice

import numpy as np

SUBSAMPLING = {"4:4:4": (1, 1), "4:2:2": (2, 1), "4:2:0": (2, 2)}  # Y blocks across and down in an MCU
MOST_SIDE = 65_500   # libjpeg's limit
CHUNK = 1 << 18      # pixels per step: its arrays stay in the processor's cache

ZIGZAG = np.array(sorted(range(64), key=lambda k: (k // 8 + k % 8, (k // 8 if (k // 8 + k % 8) % 2 else k % 8))))
LUMINANCE = np.array([
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51,
    87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101,
    72, 92, 95, 98, 112, 100, 103, 99])
CHROMINANCE = np.full((8, 8), 99)
CHROMINANCE[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]

# Huffman tables (K.3 to K.6): number of codes of 1 to 16 bits, then the symbols in order of their codes
DC_LUMA = bytes([0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]), bytes(range(12))
DC_CHROMA = bytes([0, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0]), bytes(range(12))
AC_LUMA = (bytes([0, 2, 1, 3, 3, 2, 4, 3, 5, 5, 4, 4, 0, 0, 1, 125]), bytes.fromhex(
    "01020300041105122131410613516107227114328191a1082342b1c11552d1f02433627282090a161718191a25262728292a34353637"
    "38393a434445464748494a535455565758595a636465666768696a737475767778797a838485868788898a92939495969798999aa2a3"
    "a4a5a6a7a8a9aab2b3b4b5b6b7b8b9bac2c3c4c5c6c7c8c9cad2d3d4d5d6d7d8d9dae1e2e3e4e5e6e7e8e9eaf1f2f3f4f5f6f7f8f9fa"))
AC_CHROMA = (bytes([0, 2, 1, 2, 4, 4, 3, 4, 7, 5, 4, 4, 0, 1, 2, 119]), bytes.fromhex(
    "000102031104052131061241510761711322328108144291a1b1c109233352f0156272d10a162434e125f11718191a262728292a3536"
    "3738393a434445464748494a535455565758595a636465666768696a737475767778797a82838485868788898a92939495969798999a"
    "a2a3a4a5a6a7a8a9aab2b3b4b5b6b7b8b9bac2c3c4c5c6c7c8c9cad2d3d4d5d6d7d8d9dae2e3e4e5e6e7e8e9eaf2f3f4f5f6f7f8f9fa"))
HUFFMAN = (DC_LUMA, AC_LUMA, DC_CHROMA, AC_CHROMA)
END, ZEROS = 0x00, 0xF0  # AC symbols: end of block, sixteen zeros; the others are run << 4 | size

# One pass of the accurate DCT (Loeffler, Ligtenberg and Moschytz) before its rounding, in units of 2^-13. The constants
# are rounded before they are summed, hence 10703 beside 10704.
DCT = np.array([
    [8192, 8192, 8192, 8192, 8192, 8192, 8192, 8192], [11363, 9633, 6437, 2260, -2260, -6437, -9633, -11363],
    [10703, 4433, -4433, -10703, -10703, -4433, 4433, 10703], [9633, -2259, -11362, -6436, 6436, 11362, 2259, -9633],
    [8192, -8192, -8192, 8192, 8192, -8192, -8192, 8192], [6437, -11362, 2261, 9633, -9633, -2261, 11362, -6437],
    [4433, -10704, 10704, -4433, -4433, 10704, -10704, 4433], [2260, -6436, 9633, -11363, 11363, -9633, 6436, -2260],
], dtype=np.float64)
ROW_BITS, COLUMN_BITS = 11, 15  # rounded off after the rows, after the columns; coefficients are scaled by 8


def _code_table() -> tuple[np.ndarray, np.ndarray]:
    """(4 * 256,) codes and their lengths in bits, indexed by 256 * table + symbol; length 0 where there is no code."""
    codes, lengths = np.zeros((4, 256), dtype=np.int64), np.zeros((4, 256), dtype=np.int64)
    for table, (counts, symbols) in enumerate(HUFFMAN):
        code, rest = 0, iter(symbols)
        for bits, count in enumerate(counts, 1):
            for symbol in islice(rest, count):
                codes[table, symbol], lengths[table, symbol] = code, bits
                code += 1
            code <<= 1
    return codes.ravel(), lengths.ravel()


CODES, LENGTHS = _code_table()
SIZES = np.array([k.bit_length() for k in range(1 << 12)])  # bits of a magnitude


def quantisation(quality: int, chroma: bool) -> np.ndarray:
    """(64,) divisors at a quality of 1 to 100, in row order."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    return (((CHROMINANCE if chroma else LUMINANCE).ravel() * percent + 50) // 100).clip(1, 255)


def _luma_blocks(pixels: np.ndarray, quality: int, subsampling: str) -> tuple[int, int]:
    """Blocks of Y across and down in an MCU; ValueError on arguments that the encoder does not take."""
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or pixels.ndim == 3 and pixels.shape[2] == 3):
        raise ValueError(f"JPEG needs uint8 pixels, (H, W, 3) or gray (H, W), got {pixels.dtype} {pixels.shape}")
    if not 1 <= min(pixels.shape[:2]) <= max(pixels.shape[:2]) <= MOST_SIDE:
        raise ValueError(f"a JPEG has sides of 1 to {MOST_SIDE} pixels, got {pixels.shape[1]}x{pixels.shape[0]}")
    if quality != int(quality) or not 1 <= quality <= 100:
        raise ValueError(f"quality is a whole number from 1 to 100, got {quality}")
    if subsampling not in SUBSAMPLING:
        raise ValueError(f"subsampling is one of {', '.join(SUBSAMPLING)}, got {subsampling!r}")
    return (1, 1) if pixels.ndim == 2 else SUBSAMPLING[subsampling]


# ---- from pixels to coefficients

def _ycc(rgb: np.ndarray) -> list[np.ndarray]:
    """(H, W, 3) uint8 -> Y, Cb, Cr, (H, W) int32 each, in libjpeg's fixed point with 16 fractional bits."""
    r, g, b = (rgb[..., k].astype(np.int32) for k in range(3))
    middle = (128 << 16) + (1 << 15) - 1
    return [(19595 * r + 38470 * g + 7471 * b + (1 << 15)) >> 16,
            (-11059 * r - 21709 * g + 32768 * b + middle) >> 16,
            (32768 * r - 27439 * g - 5329 * b + middle) >> 16]


def _padded(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    """Repeat the last row and column up to a size."""
    return np.pad(plane, ((0, height - plane.shape[0]), (0, width - plane.shape[1])), mode="edge")


def _halved(plane: np.ndarray, across: int, down: int) -> np.ndarray:
    """Mean of `across` x `down` pixels; rounding alternates between columns, so that it has no bias."""
    if across == down == 1:
        return plane
    pairs = plane[:, 0::2] + plane[:, 1::2]
    if down == 1:
        return (pairs + np.arange(pairs.shape[1]) % 2) >> 1
    return (pairs[0::2] + pairs[1::2] + 1 + np.arange(pairs.shape[1]) % 2) >> 2


def _coefficients(plane: np.ndarray, divisors: np.ndarray) -> np.ndarray:
    """(8R, 8C) samples -> (R, C, 64) quantised coefficients, int32, in zigzag order; floats, for BLAS, are exact."""
    rows, columns = plane.shape[0] // 8, plane.shape[1] // 8
    x = (plane - 128.0).reshape(-1, 8) @ DCT.T
    x = np.floor(x * 2.0**-ROW_BITS + 0.5)
    x = DCT @ x.reshape(rows, 8, 8 * columns)  # (R, 8, 8C)
    x = np.floor(x * 2.0**-COLUMN_BITS + 0.5)
    x = x.reshape(rows, 8, columns, 8).transpose(0, 2, 1, 3).reshape(rows, columns, 64)[..., ZIGZAG]
    steps = 8.0 * divisors[ZIGZAG]
    # halves round away from zero; no quotient is within 1/2040 below an integer, so that floor is exact
    magnitude = np.floor((np.abs(x) + steps / 2) / steps)
    return np.copysign(magnitude, x).astype(np.int32)


def _component(plane: np.ndarray, across: int, down: int, mcu_rows: int, mcu_columns: int,
               divisors: np.ndarray) -> np.ndarray:
    """Samples of one component -> (mcu_rows, mcu_columns, down * across, 64) coefficients."""
    rows, columns = -(-plane.shape[0] // 8), -(-plane.shape[1] // 8)
    real = _coefficients(_padded(plane, 8 * rows, 8 * columns), divisors)
    z = np.zeros((mcu_rows * down, mcu_columns * across, 64), dtype=np.int32)
    z[:rows, :columns] = real
    z[:rows, columns:, 0] = real[:, -1:, 0]  # libjpeg completes an MCU with dummies: the previous DC level, no detail
    z = z.reshape(mcu_rows, down, mcu_columns, across, 64).transpose(0, 2, 1, 3, 4)
    if rows < mcu_rows * down:
        z[-1, :, 1, :, 0] = z[-1, :, 0, -1:, 0]
    return z.reshape(mcu_rows, mcu_columns, down * across, 64)


def _scan(pixels: np.ndarray, quality: int, across: int, down: int) -> Iterator[np.ndarray]:
    """Yield (mcu_rows, mcu_columns, blocks per MCU, 64) coefficients from top to bottom, DC levels as differences."""
    height, width = pixels.shape[:2]
    mcu_columns = -(-width // (8 * across))
    step = 8 * down * max(1, CHUNK // (8 * down * width))
    divisors = [quantisation(quality, chroma) for chroma in (False, True, True)]
    last = [0, 0, 0]  # DC level of the previous block, by component
    for top in range(0, height, step):
        strip = pixels[top : top + step]
        mcu_rows = -(-strip.shape[0] // (8 * down))
        planes = [strip] if pixels.ndim == 2 else _ycc(strip)
        parts = [_component(planes[0], across, down, mcu_rows, mcu_columns, divisors[0])]
        for plane in planes[1:]:
            # columns are padded before halving, rows after
            plane = _halved(_padded(plane, -(-strip.shape[0] // down) * down, mcu_columns * 8 * across), across, down)
            plane = _padded(plane, 8 * mcu_rows, 8 * mcu_columns)
            parts.append(_component(plane, 1, 1, mcu_rows, mcu_columns, divisors[1]))
        for k, part in enumerate(parts):
            levels = part[..., 0].ravel()
            part[..., 0] = np.diff(levels, prepend=last[k]).reshape(part.shape[:3])
            last[k] = levels[-1]
        yield np.concatenate(parts, axis=2)


# ---- from coefficients to bits

def _codes(z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Huffman codes of the nonzero coefficients and of every block's DC level.

    z        (..., blocks per MCU, 64) as from _scan; the last two blocks are chroma if there are three or more
    returns  codes and their lengths in bits, at most 32, (N,) each in file order; bits per block, (blocks,)
    """
    blocks = z.shape[-2]
    z = z.reshape(-1, 64)
    chroma = np.arange(len(z)) % blocks >= max(blocks - 2, 1)
    written = z != 0
    written[:, 0] = True
    at = np.flatnonzero(written)
    value = z.ravel()[at]
    level = (at & 63) == 0
    firsts = np.flatnonzero(level)
    run = np.diff(at, prepend=0) - 1
    run[firsts] = 0
    table = 512 * np.repeat(chroma, np.diff(firsts, append=len(at)))  # of HUFFMAN, times 256
    size = SIZES[np.abs(value)]
    symbol = table + np.where(level, size, 256 + ((run & 15) << 4 | size))
    codes = CODES[symbol] << size | value + ((1 << size) - 1) * (value < 0)
    lengths = LENGTHS[symbol] + size
    lasts = np.append(firsts[1:], len(at)) - 1
    lasts = lasts[(at[lasts] & 63) != 63]  # an end of block is written where zeros remain
    end = table[lasts] + 256 + END
    codes[lasts] = codes[lasts] << LENGTHS[end] | CODES[end]
    lengths[lasts] += LENGTHS[end]
    bits = np.add.reduceat(lengths, firsts)
    if len(far := np.flatnonzero(run > 15)):
        far = np.repeat(far, run[far] >> 4)
        zeros = table[far] + 256 + ZEROS
        np.add.at(bits, at[far] >> 6, LENGTHS[zeros])
        codes, lengths = np.insert(codes, far, CODES[zeros]), np.insert(lengths, far, LENGTHS[zeros])
    return codes, lengths, bits


def _pack(codes: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Codes joined -> uint8 of the complete 32-bit words; the remaining bits and their number."""
    stops = np.cumsum(lengths)
    word, bit = (stops - lengths) >> 5, (stops - lengths) & 31
    placed = codes.astype(np.uint64) << (64 - bit - lengths).astype(np.uint64)  # in its first word and the next
    starts = np.flatnonzero(np.diff(word, prepend=-1))  # codes have at most 32 bits: one starts in each word
    pairs = np.bitwise_or.reduceat(placed, starts)
    words = np.append(pairs >> np.uint64(32), np.uint64(0))
    words[1:] |= pairs & np.uint64(0xFFFFFFFF)
    complete, over = divmod(int(stops[-1]), 32)
    return words[:complete].astype(">u4").view(np.uint8), int(words[complete]) >> (32 - over), over


def _header(pixels: np.ndarray, quality: int, across: int, down: int) -> bytes:
    """Everything before the scan, in libjpeg's order."""
    def segment(marker: int, *parts: bytes) -> bytes:
        body = b"".join(parts)
        return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2) + body

    kinds, components = (1, 1) if pixels.ndim == 2 else (2, 3)
    divisors = [quantisation(quality, bool(k))[ZIGZAG].astype(np.uint8).tobytes() for k in range(kinds)]
    tables = [segment(0xDB, bytes([k]), table) for k, table in enumerate(divisors)]
    frame = segment(0xC0, b"\x08", *(side.to_bytes(2) for side in pixels.shape[:2]), bytes([components]),
                    *(bytes([k + 1, 0x11 if k else across << 4 | down, min(k, 1)]) for k in range(components)))
    huffman = [segment(0xC4, bytes([(k % 2) << 4 | k // 2]), *HUFFMAN[k]) for k in range(2 * kinds)]
    choices = (bytes([k + 1, 0x11 * min(k, 1)]) for k in range(components))
    scan = segment(0xDA, bytes([components]), *choices, bytes([0, 63, 0]))
    jfif = segment(0xE0, b"JFIF\0", bytes([1, 1, 0, 0, 1, 0, 1, 0, 0]))
    return b"".join((b"\xFF\xD8", jfif, *tables, frame, *huffman, scan))


def jpeg_encode(pixels: np.ndarray, quality: int = 95, subsampling: str = "4:2:0") -> bytes:
    """The file that Pillow's save(…, "JPEG", quality=…, subsampling=…) writes; ValueError on other arguments.

    pixels  (H, W, 3) or gray (H, W), uint8, sides of 1 to 65,500; quality is 1 to 100, subsampling in SUBSAMPLING
    """
    blocks = _luma_blocks(pixels, quality, subsampling)
    out, rest, over = [_header(pixels, quality, *blocks)], 0, 0
    for z in _scan(pixels, quality, *blocks):
        codes, lengths, _ = _codes(z)
        stream, rest, over = _pack(np.append(rest, codes), np.append(over, lengths))
        out.append(np.insert(stream, np.flatnonzero(stream == 0xFF) + 1, 0).tobytes())
    fill = -over % 8  # one bits
    tail = (rest << fill | (1 << fill) - 1).to_bytes((over + fill) // 8)
    return b"".join((*out, tail.replace(b"\xFF", b"\xFF\0"), b"\xFF\xD9"))


def jpeg_size(pixels: np.ndarray, quality: int = 95, subsampling: str = "4:2:0") -> int:
    """Bytes of the JPEG that Pillow writes by default; arguments as for `jpeg_encode`."""
    return len(jpeg_encode(pixels, quality, subsampling))


def compression_ratio(rgb: np.ndarray, quality: int = 95) -> float:
    """Bytes of the raw pixels / bytes of their JPEG; lower means more detail."""
    return rgb.nbytes / jpeg_size(rgb, quality)


def jpeg_bits(pixels: np.ndarray, quality: int = 95, subsampling: str = "4:2:0") -> np.ndarray:
    """Bits of every 8x8 block of Y with an even share of its MCU's chroma, (R, C) float; sums to the scan's length."""
    across, down = _luma_blocks(pixels, quality, subsampling)
    strips = []
    for z in _scan(pixels, quality, across, down):
        bits = _codes(z)[2].reshape(z.shape[:3]).astype(np.float64)
        bits = bits[..., : across * down] + bits[..., across * down :].sum(-1, keepdims=True) / (across * down)
        rows = bits.reshape(*bits.shape[:2], down, across).transpose(0, 2, 1, 3)
        strips.append(rows.reshape(len(bits) * down, -1))
    return np.concatenate(strips)
