"""A YAML or JSON file read strictly: every complaint names file, line, place, what was got and what is wanted."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from torchrec_turbossd.cli.quantities import parse_count, parse_number, parse_size, parse_speed
from torchrec_turbossd.errors import ConfigError

T = TypeVar("T")
_MOST_VALUES = 500_000
_ODD_NUMBER = re.compile(r"[-+]?0[0-9_xb]|.*:")


@dataclass(frozen=True)
class Entry:
    """One value of a document, which knows where it stands.

    Attributes:
        value: of a scalar; entries by key or position of a mapping or list.
        place: such as `tables[2].rows`; empty for the whole document.
        file: the document's name, or that of a command-line option.
        line: from 1, where it is known.
    """

    value: Any
    place: str = ""
    file: str = ""
    line: int | None = None

    def fail(self, wanted: str) -> NoReturn:
        """Raise `ConfigError` about this value."""
        raise ConfigError(f"{self.where}: got {_shown(self.value)}, wanted {wanted}")

    @property
    def where(self) -> str:
        """File, line and place."""
        spot = f"{self.file}:{self.line}" if self.line else self.file
        return f"{spot}: {self.place}" if self.place else spot

    def keys(self, allowed: Collection[str], required: Collection[str] = ()) -> dict[str, Entry]:
        """The entries of a mapping with `allowed` keys only and all of those `required`; empty values are none.

        Raises:
            ConfigError: not such a mapping.
        """
        if not isinstance(self.value, dict):
            self.fail(f"a mapping of {', '.join(allowed)}")
        unknown = [entry for key, entry in self.value.items() if key not in allowed]
        if unknown:
            raise ConfigError(f"{unknown[0].where}: unknown key; there are {', '.join(allowed)}")
        found = {key: entry for key, entry in self.value.items() if entry.value is not None}
        missing = [key for key in required if key not in found]
        if missing:
            raise ConfigError(f"{self.where}: {', '.join(missing)} missing")
        return found

    def entries(self, wanted: str) -> list[Entry]:
        """The entries of a list that is not empty."""
        if not isinstance(self.value, list) or not self.value:
            self.fail(wanted)
        return list(self.value)

    def text(self, wanted: str = "text") -> str:
        """Text that is not empty."""
        if not isinstance(self.value, str) or not self.value.strip() or not _can_be_written(self.value):
            self.fail(wanted)
        return self.value

    def one_of(self, choices: Collection[str]) -> str:
        """One of some words, in any case."""
        word = self.value.lower() if isinstance(self.value, str) else self.value
        if word not in choices:
            self.fail(f"one of {', '.join(choices)}")
        return str(word)

    def texts(self, wanted: str) -> tuple[str, ...]:
        """One text, or a list of different ones."""
        if isinstance(self.value, str):
            return (self.text(wanted),)
        found = tuple(entry.text(wanted) for entry in self.entries(wanted))
        if len(set(found)) < len(found):
            raise ConfigError(f"{self.where}: {_first_double(found)!r} stands there twice")
        return found

    def count(self, most: int) -> int:
        """A whole number above 0 and up to `most`."""
        wanted = f"a whole number above 0, at most {most:,}, such as 1_000_000 or 1e6"
        found = self._parsed(parse_count, wanted)
        if found > most:
            self.fail(wanted)
        return found

    def number(self, wanted: str = "a number that is not negative", *, least: float = 0.0, most: float = 1e18) -> float:
        """A number that is not negative, from `least` to `most`."""
        wanted = f"{wanted}, {f'from {least:g} ' if least else ''}to {most:g}"
        found = self._parsed(parse_number, wanted)
        if not least <= found <= most:
            self.fail(wanted)
        return found

    def size(self) -> int:
        """Bytes."""
        return self._parsed(
            parse_size, 'a size above 0, below 8 EiB: a number of GiB, or text such as "40 GiB" or "512 MB"'
        )

    def speed(self) -> float:
        """Bytes per second."""
        return self._parsed(
            parse_speed, 'a speed from 1 B/s to 1e18 B/s: a number of GB/s, or text such as "3.35 TB/s"'
        )

    def _parsed(self, parse: Callable[[object], T], wanted: str) -> T:
        try:
            return parse(self.value)
        except (ValueError, OverflowError):
            self.fail(wanted)


def read_document(path: Path) -> Entry:
    """The document in a file: JSON where its name ends so, else YAML.

    Raises:
        ConfigError: it cannot be read, is no such document, or a key stands twice in a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        return _from_json(text, str(path)) if path.suffix == ".json" else _from_yaml(text, str(path))
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # A ValueError also of numbers with more digits than Python takes.
        raise ConfigError(
            f"{path} is no {'JSON' if path.suffix == '.json' else 'YAML'}: {_in_a_line(error)}"
        ) from error


def _from_json(text: str, file: str) -> Entry:
    return _wrapped(json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, file)), "", file)


def _unique(pairs: list[tuple[str, Any]], file: str) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ConfigError(f"{file}: {_first_double(keys)!r} stands twice in one object")
    return dict(pairs)


def _wrapped(value: Any, place: str, file: str) -> Entry:
    if isinstance(value, dict):
        value = {key: _wrapped(one, _below(place, key), file) for key, one in value.items()}
    elif isinstance(value, list):
        value = [_wrapped(one, f"{place}[{n}]", file) for n, one in enumerate(value)]
    return Entry(value, place, file)


def _from_yaml(text: str, file: str) -> Entry:
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        return Entry(None, "", file) if node is None else _Values(loader, file).entry(node, "")
    finally:
        loader.dispose()


class _Values:
    """Entries of the nodes of one file, which stop where aliases of aliases would fill the memory."""

    def __init__(self, loader: yaml.SafeLoader, file: str) -> None:
        self._loader, self._file, self._left = loader, file, _MOST_VALUES

    def entry(self, node: yaml.Node, place: str) -> Entry:
        line = node.start_mark.line + 1
        self._left -= 1
        if self._left < 0:
            raise ConfigError(f"{self._file}:{line}: more than {_MOST_VALUES:,} values, counted where aliases stand")
        value: Any
        if isinstance(node, yaml.MappingNode):
            value = dict(self._pairs(node, place))
        elif isinstance(node, yaml.SequenceNode):
            value = [self.entry(one, f"{place}[{n}]") for n, one in enumerate(node.value)]
        else:
            value = self._scalar(node)
        return Entry(value, place, self._file, line)

    def _scalar(self, node: yaml.Node) -> Any:
        try:
            value = self._loader.construct_object(node)
            # To YAML 1.1 these are 90 and 174, which nobody means.
            odd = isinstance(value, int | float) and not isinstance(value, bool) and _ODD_NUMBER.match(node.value)
            return node.value if odd else value
        except yaml.YAMLError:
            raise
        except Exception:
            # Such as the date 2026-99-99, or tags that the text does not go with.
            return node.value

    def _pairs(self, node: yaml.MappingNode, place: str) -> Iterator[tuple[str, Entry]]:
        own = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(own) < len(node.value):
            line = node.start_mark.line + 1
            raise ConfigError(f"{self._file}:{line}: {place or 'the document'} has a key that is not text")
        if len(set(own)) < len(own):
            line = node.value[own.index(_first_double(own))][0].start_mark.line + 1
            raise ConfigError(f"{self._file}:{line}: {_below(place, _first_double(own))} stands there twice")
        # Merge keys (<<) come first, so that a mapping's own entries override them.
        self._loader.flatten_mapping(node)
        # Merged again and again they would double each time.
        node.value = list({key.value: (key, value) for key, value in node.value}.values())
        for key, value in node.value:
            yield key.value, self.entry(value, _below(place, key.value))


def _can_be_written(text: str) -> bool:
    """Not so halves of surrogate pairs, which JSON may have alone."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text) and "\0" not in text


def _below(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key


def _first_double(values: Collection[str]) -> str:
    return next(value for value, times in Counter(values).items() if times > 1)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return "nothing" if value is None else repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split()) or "it refers to itself"


__all__ = ["Entry", "read_document"]
