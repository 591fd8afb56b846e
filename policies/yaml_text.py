"""YAML for people: every mistake is named with its line and path, and nothing in the text is read as what it is not.

A narrow YAML: one document of mappings, lists, texts, plain decimal numbers, true/false and null. Repeated keys,
explicit tags, numbers that YAML 1.1 reads in its own way (010, 1:30, 0x1F), dates, infinities and NaN are refused.
Size, nesting and the growth of aliases are bounded. Keys are texts, whatever they look like.

`read` gives the data and remembers the line of every path in it; `YamlText.explain` turns pydantic's errors, or
anybody's (path, message) pairs, into `file:line: path: what is wrong`.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

import yaml
from pydantic import BaseModel, Tag, ValidationError

from replicas.protocol import ConfigError

Loc = tuple[int | str, ...]

MAX_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_NODES = 200_000
MAX_SHOWN = 50  # mistakes; a wrong file of a megabyte must not become a message of ten

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_YAML = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,30})")
_FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)([eE][-+]?[0-9]+)?")
# Escapes can write them; databases and UTF-8 cannot.
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
_NOT_STORED = "holds a character that cannot be stored"
_WORDS: Mapping[str, bool | None] = {"true": True, "false": False, "null": None, "~": None, "": None}


@dataclass(frozen=True, slots=True)
class Mistake:
    """`path` is written as in the file's terms ("groups.auto.models[1]"), "" for the whole document."""

    line: int
    path: str
    message: str


class DocumentError(ConfigError):
    """A text that is refused. `mistakes`, one to MAX_SHOWN, are also the lines of `message`; `more` were left out."""

    def __init__(self, name: str, mistakes: Sequence[Mistake], more: int = 0) -> None:
        more += max(0, len(mistakes) - MAX_SHOWN)
        self.mistakes = tuple(mistakes[:MAX_SHOWN])
        shown = [f"{name}:{one.line}: {f'{one.path}: ' if one.path else ''}{one.message}" for one in self.mistakes]
        super().__init__("\n".join([*shown, f"and {more} more"] if more else shown), param=mistakes[0].path or None)


class YamlText:
    """One document: plain `data`, and the line of every path in it."""

    def __init__(self, name: str, data: Any, lines: Mapping[Loc, int]) -> None:
        self.name = name
        self.data = data
        self._lines = lines

    def explain(self, wrong: Iterable[tuple[Loc, str]], more: int = 0) -> DocumentError:
        """The error to raise for these (path, message) pairs; a path may end in a key that is missing."""
        return DocumentError(self.name, [self._mistake(loc, message) for loc, message in wrong], more)

    def explain_validation(self, error: ValidationError, model: type[BaseModel]) -> DocumentError:
        """The same for what pydantic found when it validated `data` as `model`."""
        problems = error.errors(include_url=False)
        wrong = [(self._loc(one), _message(one, model)) for one in problems[:MAX_SHOWN]]
        return self.explain(wrong, len(problems) - len(wrong))

    def _mistake(self, loc: Loc, message: str) -> Mistake:
        known = loc
        while known not in self._lines:
            known = known[:-1]
        return Mistake(self._lines[known], path_text(loc), message)

    def _loc(self, problem: Any) -> Loc:
        """Pydantic's location without what is not in the document: tags of unions, names of validators, "[key]"."""
        loc: Loc = ()
        for part in problem["loc"]:
            if (*loc, part) in self._lines:
                loc = (*loc, part)
        return (*loc, problem["loc"][-1]) if problem["type"] == "missing" else loc


def read(text: str, name: str) -> YamlText:
    """The document in `text`; `name` stands for its file. DocumentError."""
    root = _compose(text, name)
    builder = _Builder()
    data = builder.build(root, ())
    if builder.mistakes:
        raise DocumentError(name, builder.mistakes)
    return YamlText(name, data, builder.lines)


def path_text(loc: Loc) -> str:
    """groups.auto.models[1]; what would break the line is escaped."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part if part.isprintable() else repr(part)}" for part in loc)
    return "".join(parts).lstrip(".")


# ------------------------------------------------------------------------------------------------- text to plain data


def _compose(text: str, name: str) -> yaml.Node:
    def refuse(line: int, message: str) -> DocumentError:
        return DocumentError(name, [Mistake(line, "", message)])

    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:
        raise refuse(text[: error.start].count("\n") + 1, "is not valid Unicode") from None
    if len(encoded) > MAX_BYTES:
        raise refuse(1, f"has {len(encoded)} bytes; the limit is {MAX_BYTES}")
    try:
        for line, problem in _unwanted(text):
            raise refuse(line, problem)
        root: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise refuse(mark.line + 1 if mark else 1, f"not valid YAML: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        line = encoded[: error.position].count(b"\n") + 1
        raise refuse(line, f"not valid YAML: {error.reason}") from None
    if root is None:
        raise refuse(1, "is empty; it must be a mapping (the empty one is written {})")
    if not isinstance(root, yaml.MappingNode):
        raise refuse(root.start_mark.line + 1, "must be a mapping of keys to values")
    return root


def _unwanted(text: str) -> Iterator[tuple[int, str]]:
    """What must be found before the composer, which is recursive, sees the text."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        line = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                yield line, f"is nested more than {MAX_DEPTH} deep"
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if (tag := getattr(event, "tag", None)) is not None:
            yield line, f"the tag {tag!r} is not allowed"


class _Builder:
    """Plain data from nodes. The line of a mapping's entry is its key's."""

    def __init__(self) -> None:
        self.lines: dict[Loc, int] = {}
        self.mistakes: list[Mistake] = []
        self._nodes = self._depth = 0
        self._too_large = False

    def build(self, node: yaml.Node, loc: Loc, key_line: int = 0) -> Any:
        self._depth += 1
        try:
            return self._build(node, loc, key_line)
        finally:
            self._depth -= 1

    def _build(self, node: yaml.Node, loc: Loc, key_line: int) -> Any:
        line = self.lines[loc] = key_line or node.start_mark.line + 1
        self._nodes += 1
        # an alias may hold itself, or ten of something that holds ten
        if self._depth > MAX_DEPTH + 1 or self._nodes > MAX_NODES:
            if not self._too_large:
                self.mistakes.append(Mistake(line, "", "is too large, or its aliases make it so"))
            self._too_large = True
        if self._too_large:
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, loc)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*loc, index)) for index, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode), "there are three kinds of node"
        return self._scalar(node, line, loc)

    def _mapping(self, node: yaml.MappingNode, loc: Loc) -> dict[str, Any]:
        merges = [(key, value) for key, value in node.value if key.tag == f"{_YAML}merge"]
        merged: dict[str, Any] = {}
        for key, value in merges:  # first, so that this mapping's own entries, and their lines, come over them
            merged |= self._merge(value, key.start_mark.line + 1, loc)
        own: dict[str, Any] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                self.mistakes.append(Mistake(line, path_text(loc), "a key must be a text"))
            elif _UNSTORABLE.search(key.value):
                self.mistakes.append(Mistake(line, path_text(loc), _NOT_STORED))
            elif key.tag == f"{_YAML}merge":
                continue
            elif key.value in own:
                self.mistakes.append(Mistake(line, path_text(loc), f"{key.value!r} is given twice"))
            else:
                own[key.value] = self.build(value, (*loc, key.value), line)
        return {**merged, **own}

    def _merge(self, value: yaml.Node, line: int, loc: Loc) -> dict[str, Any]:
        """`<<: *other`: the other's entries, their lines included."""
        if isinstance(value, yaml.MappingNode):
            entries = self.build(value, loc)
            return entries if isinstance(entries, dict) else {}
        self.mistakes.append(Mistake(line, path_text(loc), "<< must be followed by one mapping"))
        return {}

    def _scalar(self, node: yaml.ScalarNode, line: int, loc: Loc) -> Any:
        text: str = node.value
        if _UNSTORABLE.search(text):
            self.mistakes.append(Mistake(line, path_text(loc), _NOT_STORED))
            return None
        if node.style in ("'", '"', "|", ">"):  # quoted or a block: it is what it looks like
            return text
        if node.tag in (f"{_YAML}bool", f"{_YAML}null") and text.lower() in _WORDS:
            return _WORDS[text.lower()]
        try:
            if _INTEGER.fullmatch(text):
                return int(text)
            if _FLOAT.fullmatch(text) and not re.fullmatch(r"[-+]?0[0-9]+", text):
                return _finite(float(text))
        except OverflowError:
            pass
        else:
            if node.tag == f"{_YAML}str":
                return text
        kind = node.tag.removeprefix(_YAML)
        self.mistakes.append(Mistake(line, path_text(loc), _misread(kind, text)))
        return None


def _finite(value: float) -> float:
    if value in (float("inf"), float("-inf")):
        raise OverflowError
    return value


def _misread(kind: str, text: str) -> str:
    shown = text if len(text) <= 40 else f"{text[:40]}…"
    if kind == "bool":
        return f"write true or false, or put quotes round {shown!r} if it is a text"
    if kind in ("int", "float", "str"):
        return f"{shown!r} is not a finite decimal number; put quotes round it if it is a text"
    return f"put quotes round {shown!r}: YAML takes it for a {kind}"


# ------------------------------------------------------------------------------------------ pydantic's errors, in words


def _message(problem: Any, model: type[BaseModel]) -> str:
    message = str(problem["msg"]).removeprefix("Value error, ")
    given = problem.get("input")
    if problem["type"] == "extra_forbidden":
        section = _section(model, problem["loc"])
        return f"unknown key; {suggestion(str(problem['loc'][-1]), section.model_fields)}"
    if problem["type"] == "literal_error" and isinstance(given, str):
        near = difflib.get_close_matches(given, re.findall("'([^']*)'", str(problem["ctx"]["expected"])), n=1)
        return f"{message}; did you mean {near[0]!r}?" if near else message
    if problem["type"] == "tuple_type":
        return "must be a list"
    if problem["type"] == "string_type" and isinstance(given, bool | int | float):
        return f"{message}; put quotes round it"
    return message


def suggestion(name: str, known: Iterable[str]) -> str:
    """What to say of a name that is not among the known ones."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(names[:20])}{', …' if len(names) > 20 else ''}" if names else "there is none"


def _section(model: type[BaseModel], loc: Sequence[int | str]) -> type[BaseModel]:
    """The section whose key is the last part of pydantic's location."""
    holder: Any = model
    for part in loc[:-1]:
        holder = _inside(holder, part)
    while get_origin(holder) is Annotated:
        holder = get_args(holder)[0]
    if get_origin(holder) in (typing.Union, types.UnionType):
        holder = next(one for one in get_args(holder) if isinstance(one, type) and issubclass(one, BaseModel))
    section: type[BaseModel] = holder
    return section


def _inside(annotation: Any, part: int | str) -> Any:
    """The type of what is under `part` in a value of this type; None where the type does not tell."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _inside(arguments[0], part)
    if origin in (typing.Union, types.UnionType):
        tagged = (one for one in arguments if Tag(str(part)) in get_args(one)[1:])
        found = (inner for one in arguments if (inner := _inside(one, part)) is not None)
        return next(tagged, None) or next(found, None)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = annotation.model_fields.get(str(part))
        return field.annotation if field else None
    if isinstance(origin, type) and arguments:
        return arguments[1] if issubclass(origin, Mapping) else arguments[0]
    return None
