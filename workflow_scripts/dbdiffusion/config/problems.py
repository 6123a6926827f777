"""What pydantic finds wrong with a config block, as problems with key, value and remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dbdiffusion.runtime.errors import nearest

_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the full key, the value found there, what is wrong, what to do."""

    key: str
    value: Any
    what: str
    remedy: str


def key_path(*parts: str | int) -> str:
    """`vae.hidden[0]` from ("vae", "hidden", 0)."""
    text = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in parts)
    return text.removeprefix(".")


def block_problems(error: ValidationError, block: type[BaseModel], prefix: tuple[str, ...]) -> Iterator[Problem]:
    """The problems of one block that stands at `prefix` of the config."""
    for detail in error.errors(include_url=False):
        what, remedy = _explain(detail, block)
        value = None if detail["type"] == "missing" else detail["input"]
        yield Problem(key_path(*prefix, *detail["loc"]), value, what, remedy)


def _explain(detail: ErrorDetails, block: type[BaseModel]) -> tuple[str, str]:
    """What is wrong and how to mend it."""
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return "unknown key", nearest(str(detail["loc"][-1]), _model_at(block, detail["loc"][:-1]).model_fields)
    if kind == "missing":
        return "key is missing", f"add the key {detail['loc'][-1]!r}"
    if kind == "literal_error":
        choices = _literals(detail["msg"])
        return f"is not one of {', '.join(choices)}", nearest(str(value), choices)
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return "is out of range", f"give a value {words} {context[name]}"
    if kind == "too_short":
        return "is too short", f"give at least {context['min_length']} item(s)"
    if kind == "string_pattern_mismatch":
        field = _model_at(block, detail["loc"][:-1]).model_fields[detail["loc"][-1]]
        return "is not understood", f"write {field.description}"
    if kind == "value_error":
        return str(context["error"]), "change the block so that this no longer holds; docs/config.md explains its keys"
    return _type_problem(kind, value)


def _type_problem(kind: str, value: Any) -> tuple[str, str]:
    """Wrong types, with what to write instead."""
    if value is None:
        return "has no value", "give a value, or comment the key out to use the preset's"
    found = f"is {_type_name(value)}"
    if kind.startswith(("int", "float")):
        whole = kind.startswith("int")
        expected = "a whole number" if whole else "a number"
        return f"{found}, expected {expected}", _number_remedy(value, whole, expected)
    if kind == "bool_type":
        return f"{found}, expected true or false", "write true or false without quotes"
    if kind == "string_type":
        words = ' such as "NO" (YAML reads yes, no, on and off as true or false)' if isinstance(value, bool) else f': "{value}"'
        return f"{found}, expected text", f"write it in quotes{words}"
    if kind == "list_type":
        return f"{found}, expected a list", f"write it as a list: [{value}]"
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        return f"{found}, expected a block of keys", "indent its keys below it"
    return f"{found}, which is not allowed here", "see the key's entry in docs/config.md"


def _type_name(value: Any) -> str:
    names = {bool: "true/false", int: "a whole number", float: "a number", str: "text", list: "a list"}
    return "a block of keys" if isinstance(value, Mapping) else names.get(type(value), type(value).__name__)


def _number_remedy(value: Any, whole: bool, expected: str) -> str:
    """YAML 1.1 reads 1e-3 and 1.0e5 as text: a float needs a point, and a sign in the exponent."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return f"write {expected}"
    if whole:
        return f"write {int(number)}" if number.is_integer() else f"round it: write {round(number)}"
    scientific = re.fullmatch(r"\s*([+-]?\d+)(\.\d*)?[eE]([+-]?)(\d+)\s*", str(value))
    if not scientific:
        return f"write {value} without quotes"
    mantissa, point, sign, exponent = scientific.groups()
    return f"write {mantissa}{point or '.0'}e{sign or '+'}{exponent} (YAML reads {value} as text)"


def _literals(message: str) -> list[str]:
    """The choices in pydantic's message: Input should be 'a', 'b' or 'c'."""
    return re.findall(r"'([^']*)'", message)


def _model_at(block: type[BaseModel], path: tuple[str | int, ...]) -> type[BaseModel]:
    """The model that holds the keys below `path`."""
    for part in path:
        if isinstance(part, str):
            block = next(iter(_models(block.model_fields[part].annotation)))
    return block


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Config blocks named in a type: the block itself, or those inside list[...] and unions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)
