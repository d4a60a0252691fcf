"""The one strict YAML reader: plain data that remembers where it was written.

YAML as PyYAML reads it is hospitable to mistakes: of duplicate keys the last wins, `0777` is 511,
`12:30` is 750, `1e3` is a string, and 400 bytes of nested aliases take minutes. Files here are small
and written by hand, so all of that is refused or read as what it looks like. Every value knows its
`file:line`, which the error messages of the scheme language and of the configuration quote.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from fdm_cli.errors import BadInput, did_you_mean

MAX_BYTES = 64 * 1024
MAX_DEPTH = 32

Scalar = str | int | float | bool | None

_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,30})")
_FLOAT = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,4})?")
_WORDS: dict[str, Scalar] = {"true": True, "false": False, "null": None, "~": None, "": None}


@dataclass(frozen=True)
class Node:
    """A value and the place it was written at.

    Attributes:
        value: a scalar, a list of nodes, or a dict from key to node (in the file's order).
        where: `file:line`, or the command-line option that it came from.
        key_where: for a mapping, the place of each of its keys.
        text: of a scalar that stands there unquoted, as it was written: 1.10 is the name of a folder, too.
    """

    value: Scalar | list[Node] | dict[str, Node]
    where: str
    key_where: Mapping[str, str] | None = None
    text: str | None = None

    def fail(self, message: str, hint: str | None = None) -> NoReturn:
        """Raises BadInput that begins with this node's place."""
        raise BadInput(f"{self.where}: {message}", hint)

    def mapping(self, what: str) -> dict[str, Node]:
        """This node's entries; BadInput when it is no mapping."""
        if not isinstance(self.value, dict):
            self.fail(f"{what} must be a mapping (key: value), not {describe(self)}")
        return self.value

    def sequence(self, what: str) -> list[Node]:
        """This node's items; BadInput when it is no list."""
        if not isinstance(self.value, list):
            self.fail(f"{what} must be a list, not {describe(self)}")
        return self.value

    def refuse_unknown(self, known: Iterable[str], what: str) -> None:
        """Raises BadInput for the first key of this mapping that is not in `known`."""
        known = set(known)
        for key in self.mapping(what):
            if key not in known:
                place = (self.key_where or {}).get(key, self.where)
                raise BadInput(f"{place}: unknown key {key!r} in {what}", did_you_mean(key, known))

    def plain(self) -> Any:
        """The value without the places: dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


def describe(node: Node) -> str:
    """The node's value in a few words, for an error message."""
    if isinstance(node.value, dict):
        return "a mapping"
    if isinstance(node.value, list):
        return "a list"
    if node.value is None:
        return "nothing"
    text = repr(node.value)
    return text if len(text) <= 60 else text[:57] + "..."


def from_plain(value: Any, where: str) -> Node:
    """Plain dicts, lists and scalars as nodes that all stand at `where`."""
    if isinstance(value, dict):
        return Node({str(key): from_plain(item, where) for key, item in value.items()}, where)
    if isinstance(value, list | tuple):
        return Node([from_plain(item, where) for item in value], where)
    if value is None or isinstance(value, str | int | float):
        return Node(value, where)
    raise BadInput(f"{where}: holds a {type(value).__name__}, which is not plain data")


def read(path: Path) -> Node:
    """Reads a YAML file.

    Raises:
        BadInput: missing or unreadable file, more than 64 KB, not UTF-8, anchors, aliases, merge keys,
            tags, duplicate keys, several documents, values that are not finite.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise BadInput(f"no such file: {path}") from None
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}") from None
    if len(data) > MAX_BYTES:
        raise BadInput(f"{path}: larger than {MAX_BYTES // 1024} KB", "such a file is written by hand and small")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadInput(f"{path}: not a text file in UTF-8") from None
    return parse(text, str(path))


def parse(text: str, name: str) -> Node:
    """Parses one YAML document; `name` stands for the file in error messages. Raises as `read` does."""
    try:
        _refuse_events(text, name)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise BadInput(f"{name}{line}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the others are of escapes beyond Unicode
        raise BadInput(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    if root is None:
        raise BadInput(f"{name}: empty")
    return _convert(root, name)


def scalar(text: str, where: str) -> Node:
    """One plain scalar as the file would read it, for `--set a.b=value`; lists and quotes as in YAML."""
    if text.lstrip()[:1] in tuple("[\"'"):
        return from_plain(parse(text, where).plain(), where)
    return Node(_resolve(text, where), where, text=text.strip())


def is_plain(text: str) -> bool:
    """Whether a text that stands there unquoted is read as itself."""
    try:
        return text.isprintable() and _resolve(text, "") == text
    except BadInput:
        return False


def _refuse_events(text: str, name: str) -> None:
    """Walks the parser's events, which do not expand anything, and refuses what could explode."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise BadInput(f"{name}:{line}: anchors and aliases (& and *) are not allowed", "write the value out")
        tag = getattr(event, "tag", None)
        if tag:
            raise BadInput(f"{name}:{line}: tags ({tag}) are not allowed", "write plain values")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise BadInput(f"{name}:{line}: nested more than {MAX_DEPTH} deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _convert(node: yaml.Node, name: str) -> Node:
    where = f"{name}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        entries: dict[str, Node] = {}
        places: dict[str, str] = {}
        for key_node, value_node in node.value:
            place = f"{name}:{key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                raise BadInput(f"{place}: a key must be a single word")
            key = key_node.value
            if key == "<<":
                raise BadInput(f"{place}: merge keys (<<) are not allowed", "write the entries out")
            if key in entries:
                raise BadInput(f"{place}: duplicate key {key!r}", f"it stands at {places[key]} already")
            entries[key] = _convert(value_node, name)
            places[key] = place
        return Node(entries, where, places)
    if isinstance(node, yaml.SequenceNode):
        return Node([_convert(item, name) for item in node.value], where)
    quoted = getattr(node, "style", None) in ("'", '"', "|", ">")
    if quoted:
        return Node(node.value, where)
    return Node(_resolve(node.value, where), where, text=node.value)


def _resolve(text: str, where: str) -> Scalar:
    """What an unquoted scalar means: a word, a whole number, a finite number, else the text itself."""
    text = text.strip()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        number = float(text)
        if not math.isfinite(number):
            raise BadInput(f"{where}: {text} is too large")
        return number
    if text.lower().lstrip("+-") in (".nan", ".inf", "nan", "inf"):
        raise BadInput(f"{where}: {text} is not a finite number")
    return text
