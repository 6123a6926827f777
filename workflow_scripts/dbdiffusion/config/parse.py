"""Config blocks from the plain values that a rule hands to its script.

Apart from `load`, so that a script's code depends on the blocks it names and not on all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from dbdiffusion.runtime.errors import UserError

B = TypeVar("B")


def parse(block: type[B] | Any, values: Mapping[str, Any]) -> B:
    """A block (or `datasets.Dataset`) from its part of a config slice. Raises UserError when the values do not fit."""
    try:
        return TypeAdapter(block).validate_python(plain(values))
    except ValidationError as error:
        name = getattr(block, "__name__", "Dataset")
        raise UserError(str(error), where=f"params of block {name}", fix="pass the block as config_slice gives it") from None


def plain(value: Any) -> Any:
    """Nested mappings and sequences as plain dicts and lists (YAML and JSON readers use several types)."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value
