"""Damage and malice done to files, each from a generator of random numbers and so again at will."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.5, 1e308, -1e308,
    float("nan"), float("inf"), "", "x", "../../etc/passwd", "/dev/zero", "\x1b[2J\x9b31m\u202e",
    "\ud800", "\x00", "x" * 100_000, [], {}, [[]], [None], [1, "x"], {"x": 1}, {"": {}},
    [[[[[[[[[[1]]]]]]]]]], list(range(5000)), "${x}", "__import__('os').system('true')",
]  # fmt: skip
"""Values to put where another was."""
CONTENTS = [
    b"", b"\xff\xfe", b"true", b"null", b"1", b"[]", b"{}", b'"x"', b"[" * 100_000,
    b'{"a":' * 50_000, b"[" * 300 + b"]" * 300, b'{"a": "\\ud800"}', b"9" * 10_000, b"NaN",
    b"\x00" * 100, gzip.compress(b"x"), b"\x80\x04\x95pickle", b"a: &a [*a]",
    b"{" + b'"a":1,' * 9999,
]  # fmt: skip
"""Contents to put in a file's place."""


def damage(rng: random.Random, folder: Path) -> str:
    """Do something to one file of a folder; what it was, to be printed."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    file = rng.choice(files)
    name = file.relative_to(folder)
    ways = [_flip] * 6 + [_bytes, _cut, _cut, _longer, _gone, _contents, _contents]
    ways += [_other_files, _no_file, _new_file]
    if file.suffix == ".json":
        ways += [_values] * 8
    if file.suffix == ".safetensors":
        ways += [_header] * 6
    if file.suffix == ".gz":
        ways += [_packed] * 4
    if file.suffix == ".png":
        ways = [*ways, *[_record] * 20, *[_chunks] * 6]
    way = rng.choice(ways)
    return f"{name}: {way.__name__.strip('_')} {way(rng, file)}"


def _flip(rng: random.Random, file: Path) -> str:
    data = bytearray(file.read_bytes() or b"\0")
    # As often in the beginning, where headers are.
    most = rng.choice([len(data), min(len(data), 400)])
    places = [rng.randrange(most) for _ in range(rng.choice([1, 1, 1, 2, 10]))]
    for place in places:
        data[place] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return str(places)


def _bytes(rng: random.Random, file: Path) -> str:
    data = bytearray(file.read_bytes())
    place, length = rng.randrange(len(data) + 1), rng.randrange(1, 64)
    data[place : place + length] = rng.randbytes(rng.choice([length, 1, 200]))
    file.write_bytes(data)
    return f"at {place}"


def _cut(rng: random.Random, file: Path) -> str:
    length = rng.choice([0, 1, 8, rng.randrange(file.stat().st_size + 1)])
    os.truncate(file, min(length, file.stat().st_size))
    return f"to {length}"


def _longer(rng: random.Random, file: Path) -> str:
    with file.open("ab") as opened:
        opened.write(rng.choice([b"\0", b"\n", b"}", b"x" * 5000, file.read_bytes()]))
    return ""


def _gone(rng: random.Random, file: Path) -> str:
    file.unlink()
    return ""


def _contents(rng: random.Random, file: Path) -> str:
    content = rng.choice(CONTENTS)
    file.write_bytes(content)
    return repr(content[:20])


def _other_files(rng: random.Random, file: Path) -> str:
    others = [other for other in sorted(file.parent.rglob("*")) if other.is_file()]
    other = rng.choice(others)
    file.write_bytes(other.read_bytes())
    return str(other.name)


def _no_file(rng: random.Random, file: Path) -> str:
    file.unlink()
    kind = rng.choice(["folder", "pipe", "device", "loop", "dangling"])
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        target = {"device": "/dev/zero", "loop": file.name, "dangling": "nothing"}[kind]
        file.symlink_to(target)
    return kind


def _new_file(rng: random.Random, file: Path) -> str:
    new = file.with_name(
        rng.choice(["x", "model", "diffusion_pytorch_model.fp16", ""]) + file.suffix
    )
    if not new.exists():
        shutil.copyfile(file, new)
        _flip(rng, new)
    return new.name


def _values(rng: random.Random, file: Path) -> str:
    data, what = mutated(rng, json.loads(file.read_bytes()))
    file.write_text(json.dumps(data), encoding="utf-8")
    return what


def mutated(rng: random.Random, data: Any) -> tuple[Any, str]:
    """JSON data with something changed in it, and what."""
    where: list[Any] = []
    if rng.random() < 0.05 or not isinstance(data, dict | list) or not data:
        return rng.choice(HOSTILE), "all"
    place = data
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys)
        where.append(key)
        inner = place[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.7:
            place = inner
            continue
        break
    way = rng.choice(["value", "value", "value", "gone", "new", "nested", "number"])
    if way == "gone":
        del place[key]
    elif way == "new" and isinstance(place, dict):
        place[rng.choice(["x", "", "\ud800", "\x1b[2J", "_class_name"])] = rng.choice(HOSTILE)
    elif way == "nested":
        deep: Any = 1
        for _ in range(rng.choice([40, 90, 400])):
            deep = [deep] if rng.random() < 0.5 else {"a": deep}
        place[key] = deep
    elif way == "number" and isinstance(inner, int | float):
        place[key] = inner * rng.choice([-1, 0, 2, 1000, 10**6, 10**12, 0.5])
    else:
        way = "value"
        place[key] = rng.choice(HOSTILE)
    return data, f"{way} at {where!r:.80}: {place[key] if way != 'gone' else ''!r:.40}"


def _header(rng: random.Random, file: Path) -> str:
    """Of a safetensors file: other names, shapes, offsets, texts; or another length of it."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8].ljust(8, b"\0"))
    header = json.loads(data[8 : 8 + length])
    if rng.random() < 0.2:
        wrong = rng.choice([0, 1, length - 1, length + 1, 2**31, 2**62, 2**64 - 1])
        file.write_bytes(struct.pack("<Q", max(0, wrong)) + data[8:])
        return f"length {wrong}"
    texts = header.get("__metadata__")
    if texts and rng.random() < 0.5:
        key = rng.choice(list(texts))
        inner, what = mutated(rng, json.loads(texts[key]) if texts[key][:1] in "{[" else texts[key])
        texts[key] = json.dumps(inner)
    else:
        header, what = mutated(rng, header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return what


def _packed(rng: random.Random, file: Path) -> str:
    """What is packed is changed, and packed again; or is a bomb."""
    if rng.random() < 0.15:
        packer = zlib.compressobj(9, zlib.DEFLATED, 31)
        zeros = bytes(2**20)
        bomb = b"".join(packer.compress(zeros) for _ in range(3000)) + packer.flush()
        file.write_bytes(bomb)
        return "bomb"
    lines = gzip.decompress(file.read_bytes()).splitlines()
    line = rng.randrange(len(lines))
    lines[line] = rng.choice([*CONTENTS, json.dumps(rng.choice(HOSTILE)).encode()])
    file.write_bytes(gzip.compress(b"\n".join(lines) + b"\n"))
    return f"line {line}"


def _png(file: Path) -> list[tuple[bytes, bytes]]:
    data, at, found = file.read_bytes(), 8, []
    while at + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        found.append((kind, data[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def _write_png(file: Path, chunks: list[tuple[bytes, bytes]]) -> None:
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in chunks:
        data += struct.pack(">I4s", len(content), kind) + content
        data += struct.pack(">I", zlib.crc32(kind + content))
    file.write_bytes(data)


def _record(rng: random.Random, file: Path) -> str:
    """What a picture says about its making, with right checksums."""
    chunks = _png(file)
    at = next(i for i, (kind, _) in enumerate(chunks) if kind == b"iTXt")
    head, text = chunks[at][1][:14], chunks[at][1][14:]  # rectiflow\0, flags, two empty names
    what = "content"
    if rng.random() < 0.3:
        text = rng.choice(CONTENTS)
    else:
        data, what = mutated(rng, json.loads(text))
        text = json.dumps(data).encode()
    way = rng.choice(["iTXt", "iTXt", "iTXt", "zTXt", "packed", "bomb"])
    if way == "iTXt":
        chunks[at] = b"iTXt", head + text
    elif way == "zTXt":
        chunks[at] = b"zTXt", b"rectiflow\0\0" + zlib.compress(text)
    elif way == "packed":
        chunks[at] = b"iTXt", b"rectiflow\0\1\0\0\0" + zlib.compress(text)
    else:
        chunks[at] = b"iTXt", b"rectiflow\0\1\0\0\0" + zlib.compress(bytes(200 * 2**20))
    _write_png(file, chunks)
    return f"{way}, {what}"


def _chunks(rng: random.Random, file: Path) -> str:
    """Another size, chunks gone, doubled or in another order."""
    chunks = _png(file)
    way = rng.choice(["size", "gone", "twice", "shuffled", "end"])
    at = rng.randrange(len(chunks))
    if way == "size":
        sizes = [rng.choice([0, 1, 3, 60_000, 2**31 - 1, 2**32 - 1]) for _ in range(2)]
        chunks[0] = b"IHDR", struct.pack(">II", *sizes) + chunks[0][1][8:]
    elif way == "gone":
        del chunks[at]
    elif way == "twice":
        chunks.insert(rng.randrange(len(chunks)), chunks[at])
    elif way == "shuffled":
        rng.shuffle(chunks)
    else:
        chunks = chunks[:at]
    _write_png(file, chunks)
    return f"{way} {at}"
