"""Numbers, texts and columns that are likely to hurt."""

from __future__ import annotations

import struct
from random import Random

UNSIGNED = (0, 1, 2, 3, 4, 7, 8, 15, 16, 31, 63, 64, 65, 127, 128, 255, 256, 257, 1000, 32767, 65535, 65536, 1 << 20)
EDGES = ((1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 53) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
FLOATS = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    2.0,
    1e-45,
    1e-7,
    100.0,
    -100.0,
    1e30,
    3.4e38,
    float("inf"),
    float("-inf"),
    float("nan"),
)
TEXTS = (
    "", " ", "\n", "\x00", "a", "é", "\u2028", "😀", "\U0010ffff", "%s%n", "{}", "{{", "{{ x }}", "../../etc/passwd", "<s>", "</s>",
    "null", "-1", "<0xFF>", "Ġ", "▁", "a" * 300,
)  # fmt: skip


def integer(random: Random, low: int, high: int) -> int:
    """A number in [low, high], often at an edge, small, or negative where that is allowed."""
    kind = random.random()
    if kind < 0.45:
        value = random.choice(UNSIGNED)
    elif kind < 0.75:
        value = random.choice(EDGES)
    elif kind < 0.9:
        value = random.randrange(0, 400)
    else:
        value = random.getrandbits(random.randrange(1, 65))
    if low < 0 and random.random() < 0.3:
        value = -value
    if low <= value <= high:
        return value
    return random.choice((low, high, max(low, min(high, value & 0x7FFFFFFF))))


def number(random: Random) -> float:
    """A float, often one that is no number."""
    return random.choice(FLOATS) if random.random() < 0.7 else random.uniform(-1000, 1000)


def text(random: Random) -> str:
    """Mostly short, at times 100,000 characters."""
    kind = random.random()
    if kind < 0.7:
        return random.choice(TEXTS)
    if kind < 0.98:
        return "".join(
            chr(random.choice((random.randrange(32, 127), random.randrange(0x20, 0xD7FF)))) for _ in range(9)
        )
    return "x" * 100_000


def column(random: Random, data: bytes) -> bytes:
    """A column that is wrong: of another length, with other numbers, of another width."""
    kind = random.randrange(10)
    width = random.choice((1, 4, 4, 4)) if len(data) % 4 == 0 else 1
    values = [data[i : i + width] for i in range(0, len(data), width)]
    if kind <= 3 and values:  # one value
        values[random.randrange(len(values))] = _value(random, width)
    elif kind == 4 and values:  # one too few
        del values[random.randrange(len(values))]
    elif kind == 5:  # one too many: twice the same, or another
        twin = random.choice(values) if values and random.random() < 0.5 else _value(random, width)
        values.insert(random.randrange(len(values) + 1), twin)
    elif kind == 6:
        random.shuffle(values)
    elif kind == 7:  # not a whole number of elements
        return data[: random.randrange(len(data) + 1)] if data and random.random() < 0.5 else data + b"\x01"
    elif kind == 8:
        return b"" if random.random() < 0.8 else random.randbytes(4 * random.randrange(20_000))
    else:
        values = [_value(random, 4) for _ in range(random.randrange(8))]
    return b"".join(values)


def other_number(random: Random, data: bytes, width: int) -> bytes:
    """The column with one number in place of another: everything else fits."""
    at = width * random.randrange(len(data) // width)
    return data[:at] + _value(random, width) + data[at + width :]


def _value(random: Random, width: int) -> bytes:
    if width == 1:
        return bytes((integer(random, 0, 255),))
    if random.random() < 0.15:
        return struct.pack("<f", number(random))
    return struct.pack("<i", integer(random, -(1 << 31), (1 << 31) - 1))


def flip(random: Random, data: bytes) -> bytes:
    """The same bytes with a few of them flipped, cut, doubled, moved or overwritten."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.randrange(len(changed) + 1)
        kind = random.randrange(7)
        if kind == 0 and changed:
            changed[at % len(changed)] ^= 1 << random.randrange(8)
        elif kind == 1 and changed:
            changed[at % len(changed)] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))
        elif kind == 2:
            del changed[at : at + random.choice((1, 2, 8, 64))]
        elif kind == 3:
            changed[at:at] = random.randbytes(random.choice((1, 2, 8, 64)))
        elif kind == 4:
            changed[at:at] = changed[at : at + random.choice((1, 8, 64))]
        elif kind == 5:
            extreme = struct.pack(random.choice(("<Q", ">Q")), random.choice(EDGES))
            changed[at : at + 8] = extreme
        else:
            del changed[at:]
    return bytes(changed)
