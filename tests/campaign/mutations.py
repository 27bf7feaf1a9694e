"""Damage to files, from a seed: values of JSON that no reader expects, broken syntax, changed bytes."""

import copy
import json
import random
import struct

DEEP = 3000  # nesting beyond Python's recursion limit
ODD_NUMBERS = (0, -1, 1, 2, 3, 7, 0.5, -0.0, 1e-320, 1e308, 2**31, 2**33, 2**63, 10**40, -(2**70), 100_000)
ODD_NUMBERS += (float("nan"), float("inf"), float("-inf"))
ODD_TEXTS = ("", " ", "x", "0", "true", "None", "\x00", "\x1b[31m", "\ud800", "\u202e", "../../../etc/passwd")
ODD_TEXTS += ("/dev/zero", "/etc/passwd", "(((a+)+)+)+$", ".*", "a" * 5000, "auto", "no", "steps", "1e3", "-1", "你好")
ODD_VALUES = (None, True, False, [], {}, [None], [[]], {"": None}, [0, "x"], {"a": {"b": [1]}}, [1e308, -1])


def odd_value(rng: random.Random, old: object) -> object:
    """Return a value to put in the place of another one."""
    kind = rng.random()
    if kind < 0.2 and isinstance(old, int | float) and not isinstance(old, bool):
        return rng.choice((old + 1, old - 1, -old, old * 2, old * 1000, float(old), str(old), [old], old * 2**20))
    if kind < 0.3 and isinstance(old, str):
        return rng.choice((old.upper(), old[:-1], old + " ", old * 3, [old], {old: old}, old + "\n", old[::-1]))
    if kind < 0.4 and isinstance(old, list):
        return rng.choice(
            (
                old[:-1],
                old + old,
                [old],
                old + [None],
                {str(index): str(item) for index, item in enumerate(old)},
                old * 500,
            )
        )
    return copy.deepcopy(rng.choice((*ODD_NUMBERS, *ODD_TEXTS, *ODD_VALUES)))  # the caller goes on changing it


def places_in(value: object) -> list[tuple]:
    """Return (container, key) of every value below a JSON value."""
    found, waiting = [], [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict | list):
            for key, child in node.items() if isinstance(node, dict) else enumerate(node):
                found.append((node, key))
                waiting.append(child)
    return found


def mutate_value(rng: random.Random, value: object, extra_keys: tuple = ()) -> object:
    """Return a JSON value with one to three changes: values replaced, keys deleted, misspelt, doubled, added.

    Args:
        rng: The random numbers.
        value: A value that no other case uses.
        extra_keys: Keys that a reader knows, which may be added with odd values.
    """
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = places_in(value)
        if not places or rng.random() < 0.03:
            return odd_value(rng, value)
        container, key = rng.choice(places)
        action = rng.random()
        if action < 0.6:
            container[key] = odd_value(rng, container[key])
        elif action < 0.7:
            del container[key]
        elif isinstance(container, dict) and action < 0.8:
            container[str(rng.choice((key + "s", key.upper(), key[:-1], "__class__", "\ud800")))] = container.pop(key)
        elif isinstance(container, dict) and extra_keys:
            container[rng.choice(extra_keys)] = odd_value(rng, None)
        else:
            container[key] = [container[key]] if rng.random() < 0.5 else {"a": container[key]}
    return value


def dump(value: object) -> bytes:
    """Return a JSON value as a file, lone surrogates escaped."""
    return json.dumps(value).encode()


def mutate_json(rng: random.Random, value: object, extra_keys: tuple = ()) -> bytes:
    """Return a JSON file with a changed value, broken syntax or changed bytes."""
    kind = rng.random()
    if kind < 0.82:
        return dump(mutate_value(rng, value, extra_keys))
    text = dump(value)
    if kind < 0.9:
        return mutate_bytes(rng, text)
    doubled = text.rstrip()[:-1] + b"," + text.lstrip()[1:] if text[:1] == b"{" else text * 2
    return rng.choice(
        (
            b"",
            b"\xef\xbb\xbf" + text,
            text.decode().encode("utf-16"),
            b"[" * DEEP + b"]" * DEEP,
            b'{"a":' * DEEP + b"1" + b"}" * DEEP,
            b'{"a": 1' + b"0" * 6000 + b"}",
            text.replace(b":", b": // comment\n", 1),
            text.replace(b'"', b"'"),
            doubled,
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            b"<!DOCTYPE html><html></html>",
            text + b"\x00" * 100,
            b"null",
        )
    )


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Return bytes that were cut, changed, inserted or repeated."""
    if not data:
        return rng.randbytes(rng.randrange(64))
    kind, place = rng.randrange(6), rng.randrange(len(data))
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + rng.randbytes(1) + data[place + 1 :]
    if kind == 2:
        return data[:place] + rng.randbytes(rng.randrange(1, 40)) + data[place:]
    if kind == 3:
        return data[:place] + data[place + rng.randrange(1, 400) :]
    if kind == 4:
        return data[:place] + bytes(min(len(data) - place, rng.randrange(1, 5000))) + data[place + 5000 :]
    return data[:place] + data[place : place + 200] * rng.randrange(2, 20) + data[place:]


def mutate_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Return a safetensors file whose header lies, or whose bytes were changed."""
    size = struct.unpack("<Q", data[:8])[0]
    kind = rng.random()
    if kind < 0.15:
        return mutate_bytes(rng, data)
    if kind < 0.25:
        lie = rng.choice((0, 1, size - 1, size + 1, size * 2, 2**31, 2**63, 2**64 - 1, len(data), 100_000_001))
        return struct.pack("<Q", lie) + data[8:]
    header = mutate_json(rng, json.loads(data[8 : 8 + size]))
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def mutate_lines(rng: random.Random, rows: list[dict], extra_keys: tuple = ()) -> bytes:
    """Return a JSONL or JSON file of examples of which some are changed."""
    rows = [mutate_value(rng, row, extra_keys) if rng.random() < 0.4 else row for row in rows]
    lines = [dump(row) for row in rows] if rng.random() < 0.8 else [dump(rows)]
    lines = [mutate_bytes(rng, line) if rng.random() < 0.05 else line for line in lines]
    text = rng.choice((b"\n", b"\n", b"\r\n", b"\n\n", b"\r", b"\x00\n", b"\xe2\x80\xa8")).join(lines)
    return mutate_bytes(rng, text) if rng.random() < 0.1 else text
