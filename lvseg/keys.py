"""Files of keys: YAML with checked ones, as experiment files and dataset cards are, and the JSON that lvseg writes."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from lvseg.errors import InputError


class Keys(BaseModel):
    """A group of keys: no others are known, and a value of another type is refused, not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


# What pydantic puts into the place of an error to say which type of a union it tried.
UNION_TAGS = frozenset(("str", "list[str]", "dict[str,str]", "PatientList"))

Checked = TypeVar("Checked", bound=Keys)


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML without repeated keys, of which PyYAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise ValueError(f"the key {name} stands there twice")
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text; InputError BAD_CONFIG naming `where` if it does not parse or repeats a key."""
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)  # a SafeLoader: builds no objects
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        problem = " ".join(str(error).split()).rstrip(".").replace(". ", ", ")
        raise InputError(
            "BAD_CONFIG", f"Expected YAML, received text that cannot be read in {where}: {problem}."
        ) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping; InputError NOT_FOUND or BAD_CONFIG."""
    values = parse_yaml(_text(path, "YAML", "BAD_CONFIG"), str(path))
    return _mapping({} if values is None else values, path, "BAD_CONFIG")  # None: nothing but comments


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object, whose 1e-09 is a number as it is not in YAML; InputError NOT_FOUND or BAD_FILE."""
    text = _text(path, "JSON", "BAD_FILE")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError("BAD_FILE", f"Expected JSON, received text that cannot be read in {path}: {error}.") from error
    return _mapping(values, path, "BAD_FILE")


def _text(path: Path, what: str, code: str) -> str:
    if not path.is_file():
        found = "a folder" if path.is_dir() else "a path that does not exist"
        raise InputError("NOT_FOUND", f"Expected a {what} file, received {found}: {path}.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(code, f"Expected {what} in UTF-8, received other bytes in {path}.") from error


def _mapping(values: Any, path: Path, code: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise InputError(code, f"Expected keys with values, received {type(values).__name__} in {path}.")
    return values


def check_keys(kind: type[Checked], values: dict[str, Any], where: str) -> Checked:
    """Builds `kind` from a file's values; InputError BAD_CONFIG, one sentence naming the key and `where` it stands."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        # An unknown key first: it is often the misspelt name of one that is missing.
        first, *others = sorted(_meant(error.errors()), key=lambda one: one["type"] != "extra_forbidden")
        more = f" ({len(others)} more like it)" if others else ""
        raise InputError("BAD_CONFIG", _sentence(kind, first, f"in {where}{more}")) from error


def _meant(errors: list[Any]) -> list[Any]:
    """Without those of a value's other types where, as the type that it is, something inside it is wrong."""
    inner = {
        one["loc"][:place] for one in errors for place, part in enumerate(one["loc"][:-1]) if str(part) in UNION_TAGS
    }
    return [
        one for one in errors if not UNION_TAGS.intersection(map(str, one["loc"][-1:])) or one["loc"][:-1] not in inner
    ]


def _sentence(kind: type[BaseModel], error: Any, where: str) -> str:
    names = [str(part) for part in error["loc"] if str(part) not in UNION_TAGS]
    key = ".".join(names)
    if error["type"] == "extra_forbidden":
        siblings = list(_group(kind, names[:-1]).model_fields)
        known = {path.split(".")[-1]: path for path in _paths(kind)} | {
            name: ".".join([*names[:-1], name]) for name in siblings
        }
        close = difflib.get_close_matches(names[-1], siblings, n=1) or difflib.get_close_matches(names[-1], known, n=1)
        if close:
            meant = close[0] if close[0] in siblings else known[close[0]]
            return f"Expected a known key, received {key} (did you mean {meant}?) {where}."
        return f"Expected one of {', '.join(siblings)}, received the unknown key {key} {where}."
    if error["type"] == "missing":
        return f"Expected the key {key}, received none {where}."
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])
        return f"{message[0].upper()}{message[1:]} {where}."
    what, _, expected = error["msg"].partition(" should ")
    expected = expected.removeprefix("be a valid ").removeprefix("be ").replace(" after validation", "")
    if error["type"] == "path_type":
        what, expected = "Input", "path"
    if what != "Input":
        return f"Expected {key} to {expected}, received {error['input']!r} {where}."
    if error["type"] == "model_type":
        expected = "keys with values"
    hint = ""
    if isinstance(error["input"], str) and error["type"].startswith(("float", "int")):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(error["input"])
            whole = error["type"].startswith("int")
            hint = f" (YAML reads it as text; write {int(number) if whole else f'{number:.1e}'})"
    if error["type"] in ("string_type", "path_type") and type(error["input"]) is int:
        hint = " (YAML reads it as a number; write it in quotes)"
    return f"Expected {expected} for {key}, received {error['input']!r}{hint} {where}."


def _paths(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all keys, groups and what is in them."""
    paths = []
    for name in kind.model_fields:
        group = _group(kind, [name])
        paths += [prefix + name] if group is kind else _paths(group, f"{prefix}{name}.")
    return paths


def _group(kind: type[BaseModel], names: list[str]) -> type[BaseModel]:
    for name in names:
        field = kind.model_fields.get(name)
        if field is None:
            break
        annotation: Any = field.annotation
        options = get_args(annotation) if get_origin(annotation) is not None else (annotation,)
        groups = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
        if groups:
            kind = groups[0]
    return kind


def digest(values: Any) -> str:
    """sha256 of a JSON-able value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def changed_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Names, dotted, of the keys whose values differ between two resolved configs."""
    names = []
    for key in sorted(set(old) | set(new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            names += changed_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            names.append(f"{prefix}{key}")
    return names
