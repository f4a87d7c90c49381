"""YAML as people write it: the core schema of YAML 1.2, for every file of settings and ``--set``.

PyYAML reads YAML 1.1, where `no` and `off` are False, `1e-4` is a text, `010` is eight, `1:30` is
ninety and `2026-12-01` is a date. In YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema) only
`true` and `false` are booleans, `1e-4` is a number, `010` is ten, and the last two are texts.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from rectiflow.errors import InputError
from rectiflow.guarded import MOST_DEPTH, Unreadable, as_text, check_nesting, read_bytes

MOST_VALUES = 100_000
"""In a file of settings."""
_TAG = "tag:yaml.org,2002:"
_CORE = {
    "null": (r"~|null|Null|NULL|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)"
        r"|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
"""What plain scalars are, by pattern, and the characters that they begin with."""


class _Loader(yaml.SafeLoader):
    """PyYAML's loader with the types of YAML 1.2, and no key twice."""

    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {
        "<": [(_TAG + "merge", re.compile("^<<$"))]
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if key.tag != _TAG + "merge" and key.value.__hash__ is not None:
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is there twice", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)

    def construct_core_int(self, node: Any) -> int:
        text = self.construct_scalar(node)
        base = {"0o": 8, "0x": 16}.get(text[:2].lower(), 10)
        return int(text[2:] if base != 10 else text, base)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would not read as a text."""

    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = dict(
        yaml.SafeDumper.yaml_implicit_resolvers
    )


for _name, (_pattern, _first) in _CORE.items():
    _regexp = re.compile(f"^(?:{_pattern})$")
    _Loader.add_implicit_resolver(_TAG + _name, _regexp, [*_first, *[""] * (_name == "null")])
    if _name in ("int", "float"):  # added, so that they come after those of YAML 1.1
        _Dumper.add_implicit_resolver(_TAG + _name, _regexp, list(_first))
_Loader.add_constructor(_TAG + "int", _Loader.construct_core_int)


def parse_yaml(text: str) -> Any:
    """What a text in YAML says.

    Raises:
        InputError: It is not YAML, or a key is there twice.

    Example:
        >>> parse_yaml("[no, on, 1e-4, 010, 0x10, 1_000, 1:30, true, null]")
        ['no', 'on', 0.0001, 10, 16, '1_000', '1:30', True, None]
    """
    try:
        found = yaml.load(text, Loader=_Loader)
        check_nesting(found, "")
        if _expanded(found, {}) > MOST_VALUES:
            raise ValueError(f"with its aliases it has more than {MOST_VALUES} values")
    except (yaml.YAMLError, ValueError, AttributeError, TypeError, RecursionError) as error:
        deep = isinstance(error, RecursionError)
        why = f"nested more than {MOST_DEPTH} deep" if deep else " ".join(str(error).split())
        raise InputError(f"not YAML: {why}") from error
    return found


def _expanded(data: Any, known: dict[int, int]) -> int:
    """How many values there are, each as often as it is referred to."""
    if not isinstance(data, dict | list):
        return 1
    if id(data) not in known:
        inner = data.values() if isinstance(data, dict) else data
        known[id(data)] = 1 + sum(_expanded(value, known) for value in inner)
    return known[id(data)]


def read_yaml(file: Path) -> dict[str, Any]:
    """A file of settings.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    try:
        content = parse_yaml(as_text(read_bytes(file), file))
    except Unreadable:
        raise
    except InputError as error:
        raise InputError(f"{file} is {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no settings: write one `key: value` per line")
    return content


def dump_yaml(data: Any) -> str:
    """Data as YAML, the same in both versions."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
