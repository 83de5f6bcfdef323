"""The baseline JPEG encoder in NumPy: the very bytes that libjpeg-turbo, and so Pillow, writes.

Paper     Diffusion-4K section 3.1, Compression Ratio: raw bytes / bytes of the JPEG at quality 95
Mirrors   libjpeg-turbo's defaults (accurate integer DCT, standard Huffman tables, no optimisation), which Pillow uses;
          held byte for byte by tests/test_metrics.py
Standard  ITU T.81: Annex K has the quantisation and Huffman tables, figure A.6 the zigzag
Shapes    R and C block rows and columns; an MCU is the blocks of one square of the picture, at 4:2:0 four of Y, one of Cb, one of Cr
Steps     RGB to YCbCr, chroma halved, 8x8 blocks, DCT, division by the table, zigzag, runs of zeros, Huffman codes, 0xFF followed by 0x00
Check     python -m pytest tests/test_metrics.py -k jpeg ; python bench.py jpeg

Nothing is approximated: a coefficient that differs by one changes the file.
"""

from collections.abc import Iterator

import numpy as np

SUBSAMPLING = {"4:4:4": (1, 1), "4:2:2": (2, 1), "4:2:0": (2, 2)}  # Y blocks across and down in an MCU
MOST_SIDE = 65_500   # libjpeg's limit
CHUNK = 1 << 18      # pixels a step: what it makes of them stays in the processor's cache

ZIGZAG = np.array(sorted(range(64), key=lambda k: (k // 8 + k % 8, (k // 8 if (k // 8 + k % 8) % 2 else k % 8))))
LUMINANCE = np.array([
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101,
    72, 92, 95, 98, 112, 100, 103, 99])
CHROMINANCE = np.full((8, 8), 99)
CHROMINANCE[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]

# Huffman tables (K.3 to K.6): how many codes there are of 1 to 16 bits, then the symbols in order of their codes.
# A symbol of AC is run << 4 | size. End of block 0x00, sixteen zeros 0xF0.
DC_LUMA = (bytes([0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]), bytes(range(12)))
DC_CHROMA = (bytes([0, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0]), bytes(range(12)))
AC_LUMA = (bytes([0, 2, 1, 3, 3, 2, 4, 3, 5, 5, 4, 4, 0, 0, 1, 125]), bytes.fromhex(
    "01020300041105122131410613516107227114328191a1082342b1c11552d1f02433627282090a161718191a25262728292a3435363738393a43444546474849"
    "4a535455565758595a636465666768696a737475767778797a838485868788898a92939495969798999aa2a3a4a5a6a7a8a9aab2b3b4b5b6b7b8b9bac2c3c4c5"
    "c6c7c8c9cad2d3d4d5d6d7d8d9dae1e2e3e4e5e6e7e8e9eaf1f2f3f4f5f6f7f8f9fa"))
AC_CHROMA = (bytes([0, 2, 1, 2, 4, 4, 3, 4, 7, 5, 4, 4, 0, 1, 2, 119]), bytes.fromhex(
    "000102031104052131061241510761711322328108144291a1b1c109233352f0156272d10a162434e125f11718191a262728292a35363738393a434445464748"
    "494a535455565758595a636465666768696a737475767778797a82838485868788898a92939495969798999aa2a3a4a5a6a7a8a9aab2b3b4b5b6b7b8b9bac2c3"
    "c4c5c6c7c8c9cad2d3d4d5d6d7d8d9dae2e3e4e5e6e7e8e9eaf2f3f4f5f6f7f8f9fa"))
HUFFMAN = (DC_LUMA, AC_LUMA, DC_CHROMA, AC_CHROMA)
END, ZEROS = 0x00, 0xF0

# One pass of the accurate DCT (Loeffler, Ligtenberg and Moschytz) up to its rounding, in units of 2^-13. The constants are
# rounded before they are added up, hence 10703 beside 10704.
DCT = np.array([
    [8192, 8192, 8192, 8192, 8192, 8192, 8192, 8192],
    [11363, 9633, 6437, 2260, -2260, -6437, -9633, -11363],
    [10703, 4433, -4433, -10703, -10703, -4433, 4433, 10703],
    [9633, -2259, -11362, -6436, 6436, 11362, 2259, -9633],
    [8192, -8192, -8192, 8192, 8192, -8192, -8192, 8192],
    [6437, -11362, 2261, 9633, -9633, -2261, 11362, -6437],
    [4433, -10704, 10704, -4433, -4433, 10704, -10704, 4433],
    [2260, -6436, 9633, -11363, 11363, -9633, 6436, -2260]], dtype=np.float64)
ROW_BITS, COLUMN_BITS = 11, 15  # rounded off after the rows, after the columns; coefficients come out eight times as large


def _code_table() -> tuple[np.ndarray, np.ndarray]:
    """(4 * 256,) codes and their lengths in bits, table and symbol in one index; length 0 where there is no code."""
    codes, lengths = np.zeros((4, 256), dtype=np.int64), np.zeros((4, 256), dtype=np.int64)
    for table, (counts, symbols) in enumerate(HUFFMAN):
        code, symbol = 0, iter(symbols)
        for bits, count in enumerate(counts, 1):
            for _ in range(count):
                at = next(symbol)
                codes[table, at], lengths[table, at] = code, bits
                code += 1
            code <<= 1
    return codes.ravel(), lengths.ravel()


CODES, LENGTHS = _code_table()
SIZES = np.array([k.bit_length() for k in range(1 << 12)])  # of a magnitude, in bits


def quantisation(quality: int, chroma: bool) -> np.ndarray:
    """(64,) divisors at a quality of 1 to 100, in row order."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    return (((CHROMINANCE if chroma else LUMINANCE).ravel() * percent + 50) // 100).clip(1, 255)


def _check(pixels: np.ndarray, quality: int, subsampling: str) -> None:
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or pixels.ndim == 3 and pixels.shape[2] == 3):
        raise ValueError(f"a JPEG is made of uint8 pixels (H, W, 3) or gray (H, W), got {pixels.dtype} {pixels.shape}")
    if not 1 <= min(pixels.shape[:2]) <= max(pixels.shape[:2]) <= MOST_SIDE:
        raise ValueError(f"a JPEG has sides of 1 to {MOST_SIDE} pixels, got {pixels.shape[1]}x{pixels.shape[0]}")
    if quality != int(quality) or not 1 <= quality <= 100:
        raise ValueError(f"quality is a whole number from 1 to 100, got {quality}")
    if subsampling not in SUBSAMPLING:
        raise ValueError(f"subsampling is one of {', '.join(SUBSAMPLING)}, got {subsampling!r}")


# ---- from pixels to coefficients

def _ycc(rgb: np.ndarray) -> list[np.ndarray]:
    """(H, W, 3) uint8 to Y, Cb, Cr, (H, W) int32 each: the fixed point of libjpeg, 16 bits behind the point."""
    r, g, b = (rgb[..., k].astype(np.int32) for k in range(3))
    middle = (128 << 16) + (1 << 15) - 1
    return [(19595 * r + 38470 * g + 7471 * b + (1 << 15)) >> 16,
            (-11059 * r - 21709 * g + 32768 * b + middle) >> 16,
            (32768 * r - 27439 * g - 5329 * b + middle) >> 16]


def _padded(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    """Repeat the last row and column up to a size."""
    return np.pad(plane, ((0, height - plane.shape[0]), (0, width - plane.shape[1])), mode="edge")


def _halved(plane: np.ndarray, across: int, down: int) -> np.ndarray:
    """Mean of `across` x `down` pixels; the rounding alternates from column to column, so that it does not drift."""
    if across == down == 1:
        return plane
    pairs = plane[:, 0::2] + plane[:, 1::2]
    if down == 1:
        return (pairs + np.arange(pairs.shape[1]) % 2) >> 1
    return (pairs[0::2] + pairs[1::2] + 1 + np.arange(pairs.shape[1]) % 2) >> 2


def _coefficients(plane: np.ndarray, divisors: np.ndarray) -> np.ndarray:
    """(8R, 8C) samples to (R, C, 64) quantised coefficients, int32, in zigzag order.

    Floats hold every integer here exactly, so that the products can go through BLAS.
    """
    rows, columns = plane.shape[0] // 8, plane.shape[1] // 8
    x = (plane - 128.0).reshape(-1, 8) @ DCT.T
    x = np.floor(x * 2.0**-ROW_BITS + 0.5)
    x = DCT @ x.reshape(rows, 8, 8 * columns)  # (R, 8, 8C)
    x = np.floor(x * 2.0**-COLUMN_BITS + 0.5)
    x = x.reshape(rows, 8, columns, 8).transpose(0, 2, 1, 3).reshape(rows, columns, 64)[..., ZIGZAG]
    steps = 8.0 * divisors[ZIGZAG]
    magnitude = np.floor((np.abs(x) + steps / 2) / steps)  # halves away from zero; no quotient is within 1/2040 below a whole number
    return np.copysign(magnitude, x).astype(np.int32)


def _component(plane: np.ndarray, across: int, down: int, mcu_rows: int, mcu_columns: int, divisors: np.ndarray) -> np.ndarray:
    """Samples of one component to (mcu_rows, mcu_columns, down * across, 64) coefficients.

    Where an MCU reaches over the last block of the picture, libjpeg puts dummies: the level of the block before them, no detail.
    """
    rows, columns = -(-plane.shape[0] // 8), -(-plane.shape[1] // 8)
    real = _coefficients(_padded(plane, 8 * rows, 8 * columns), divisors)
    z = np.zeros((mcu_rows * down, mcu_columns * across, 64), dtype=np.int32)
    z[:rows, :columns] = real
    z[:rows, columns:, 0] = real[:, -1:, 0]
    z = z.reshape(mcu_rows, down, mcu_columns, across, 64).transpose(0, 2, 1, 3, 4)
    if rows < mcu_rows * down:
        z[-1, :, 1, :, 0] = z[-1, :, 0, -1:, 0]
    return z.reshape(mcu_rows, mcu_columns, down * across, 64)


def _scan(pixels: np.ndarray, quality: int, subsampling: str) -> Iterator[np.ndarray]:
    """Yield chunks of (mcu_rows, mcu_columns, blocks of an MCU, 64) coefficients from top to bottom, levels as differences."""
    height, width = pixels.shape[:2]
    gray = pixels.ndim == 2
    across, down = (1, 1) if gray else SUBSAMPLING[subsampling]
    mcu_columns = -(-width // (8 * across))
    step = 8 * down * max(1, CHUNK // (8 * down * width))
    divisors = [quantisation(quality, chroma) for chroma in (False, True, True)]
    last = [0, 0, 0]  # level of the block before, by component
    for top in range(0, height, step):
        strip = pixels[top : top + step]
        mcu_rows = -(-strip.shape[0] // (8 * down))
        planes = [strip] if gray else _ycc(strip)
        shared = [_component(planes[0], across, down, mcu_rows, mcu_columns, divisors[0])]
        for plane in planes[1:]:
            # columns are repeated before they are halved, rows after
            plane = _halved(_padded(plane, -(-strip.shape[0] // down) * down, mcu_columns * 8 * across), across, down)
            shared.append(_component(_padded(plane, 8 * mcu_rows, 8 * mcu_columns), 1, 1, mcu_rows, mcu_columns, divisors[1]))
        for k, part in enumerate(shared):
            levels = part[..., 0].ravel()
            part[..., 0] = np.diff(levels, prepend=last[k]).reshape(part.shape[:3])
            last[k] = levels[-1]
        yield np.concatenate(shared, axis=2)


# ---- from coefficients to bits

def _codes(z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What every coefficient that is not zero, and the level of every block, is written as.

    z        (..., blocks of an MCU, 64), as _scan yields them; the last two blocks are chroma if there are three or more
    returns  codes and lengths in bits, (N,) each in the order of the file, at most 32 bits; bits of each block, (blocks,)
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
    lasts = lasts[(at[lasts] & 63) != 63]  # an end is written where zeros remain
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
    """Codes one after the other as bytes.

    returns  (bytes,) uint8, whole 32-bit words only; the bits that remain and how many they are
    """
    stops = np.cumsum(lengths)
    word, bit = (stops - lengths) >> 5, (stops - lengths) & 31
    placed = codes.astype(np.uint64) << (64 - bit - lengths).astype(np.uint64)  # over the word it starts in and the next
    starts = np.flatnonzero(np.diff(word, prepend=-1))  # no code is longer than a word: one starts in each
    pairs = np.bitwise_or.reduceat(placed, starts)
    words = np.append(pairs >> np.uint64(32), np.uint64(0))
    words[1:] |= pairs & np.uint64(0xFFFFFFFF)
    whole, over = divmod(int(stops[-1]), 32)
    return words[:whole].astype(">u4").view(np.uint8), int(words[whole]) >> (32 - over), over


def _stuffed(stream: np.ndarray) -> bytes:
    return np.insert(stream, np.flatnonzero(stream == 0xFF) + 1, 0).tobytes()


def _header(pixels: np.ndarray, quality: int, subsampling: str) -> bytes:
    """Everything before the scan, in the order of libjpeg."""
    def segment(marker: int, *parts: bytes) -> bytes:
        body = b"".join(parts)
        return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2) + body

    gray = pixels.ndim == 2
    across, down = (1, 1) if gray else SUBSAMPLING[subsampling]
    kinds, components = (1, 1) if gray else (2, 3)
    tables = [segment(0xDB, bytes([k]), quantisation(quality, bool(k))[ZIGZAG].astype(np.uint8).tobytes()) for k in range(kinds)]
    frame = segment(0xC0, b"\x08", *(side.to_bytes(2) for side in pixels.shape[:2]), bytes([components]),
                    *(bytes([k + 1, 0x11 if k else across << 4 | down, min(k, 1)]) for k in range(components)))
    huffman = [segment(0xC4, bytes([(k % 2) << 4 | k // 2]), *HUFFMAN[k]) for k in range(2 * kinds)]
    scan = segment(0xDA, bytes([components]), *(bytes([k + 1, 0x11 * min(k, 1)]) for k in range(components)), bytes([0, 63, 0]))
    return b"".join((b"\xFF\xD8", segment(0xE0, b"JFIF\0", bytes([1, 1, 0, 0, 1, 0, 1, 0, 0])), *tables, frame, *huffman, scan))


def jpeg_encode(pixels: np.ndarray, quality: int = 95, subsampling: str = "4:2:0") -> bytes:
    """The file that Pillow's save(…, "JPEG", quality=…, subsampling=…) writes.

    pixels   (H, W, 3) or gray (H, W), uint8
    quality  1 to 100
    returns  bytes
    raises   ValueError on other pixels, sides over 65,500, or another quality or subsampling
    """
    _check(pixels, quality, subsampling)
    out, rest, over = [_header(pixels, quality, subsampling)], 0, 0
    for z in _scan(pixels, quality, subsampling):
        codes, lengths, _ = _codes(z)
        stream, rest, over = _pack(np.append(rest, codes), np.append(over, lengths))
        out.append(_stuffed(stream))
    fill = -over % 8  # with ones
    tail = (rest << fill | (1 << fill) - 1).to_bytes((over + fill) // 8)
    return b"".join((*out, tail.replace(b"\xFF", b"\xFF\0"), b"\xFF\xD9"))


def jpeg_size(pixels: np.ndarray, quality: int = 95, subsampling: str = "4:2:0") -> int:
    """Bytes of the JPEG that Pillow writes by default; arguments as of `jpeg_encode`."""
    return len(jpeg_encode(pixels, quality, subsampling))


def jpeg_bits(pixels: np.ndarray, quality: int = 95, subsampling: str = "4:2:0") -> np.ndarray:
    """Where the bits go: those of every 8x8 block of Y, with an even share of its MCU's chroma. Arguments as of `jpeg_encode`.

    returns  (R, C) float, R and C blocks that whole MCUs cover; the sum is the length of the scan in bits, before padding and stuffing
    """
    _check(pixels, quality, subsampling)
    across, down = (1, 1) if pixels.ndim == 2 else SUBSAMPLING[subsampling]
    strips = []
    for z in _scan(pixels, quality, subsampling):
        bits = _codes(z)[2].reshape(z.shape[:3]).astype(np.float64)
        bits = bits[..., : across * down] + bits[..., across * down :].sum(-1, keepdims=True) / (across * down)
        strips.append(bits.reshape(*bits.shape[:2], down, across).transpose(0, 2, 1, 3).reshape(bits.shape[0] * down, -1))
    return np.concatenate(strips)
