"""Tabular contracts between stages: one schema object each, checked on write and on read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from dbdiffusion.runtime.errors import UserError
from dbdiffusion.runtime.files import atomic_path

_CHECKS = {
    "str": lambda s: s.dtype == object or isinstance(s.dtype, (pd.CategoricalDtype, pd.StringDtype)),
    "int": pd.api.types.is_integer_dtype,
    "float": pd.api.types.is_float_dtype,
    "bool": pd.api.types.is_bool_dtype,
}


@dataclass(frozen=True)
class Column:
    """One column: kind is str, int, float or bool; `missing` tells whether NaN is allowed."""

    name: str
    kind: str
    unit: str
    meaning: str
    missing: bool = False
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A tabular contract, stored as parquet."""

    name: str
    meaning: str
    columns: Sequence[Column]
    key: Sequence[str]

    @property
    def names(self) -> list[str]:
        return [column.name for column in self.columns]

    def check(self, frame: pd.DataFrame, where: str) -> pd.DataFrame:
        """The frame with exactly the contract's columns, in its order.

        Raises UserError naming the first column that is missing, has the wrong type, holds missing
        or undeclared values, and when the key is not unique.
        """
        fix = f"write it through contracts.{self.name.upper()}; see the table reference for its columns"
        absent = [name for name in self.names if name not in frame.columns]
        if absent:
            raise UserError(f"column(s) {absent} missing; found {list(frame.columns)}", where=where, fix=fix)
        for column in self.columns:
            series = frame[column.name]
            if not _CHECKS[column.kind](series) and len(series):
                raise UserError(f"column {column.name!r} has type {series.dtype}, expected {column.kind}", where=where, fix=fix)
            values = series.to_numpy() if column.kind == "float" else None
            if not column.missing and series.isna().any():
                raise UserError(f"column {column.name!r} has {int(series.isna().sum())} missing value(s)", where=where, fix=fix)
            if values is not None and np.isinf(values).any():
                raise UserError(f"column {column.name!r} has infinite values", where=where, fix=fix)
            if column.choices:
                strange = set(series.dropna().unique()) - set(column.choices)
                if strange:
                    raise UserError(f"column {column.name!r} holds {sorted(strange)}, expected {column.choices}", where=where, fix=fix)
        if self.key and frame.duplicated(list(self.key)).any():
            raise UserError(f"rows are not unique by {list(self.key)}", where=where, fix=fix)
        return frame[self.names]

    def write(self, frame: pd.DataFrame, path: str | Path) -> None:
        """Check and write; text columns are stored as dictionaries, which keeps long tables small."""
        frame = self.check(frame, str(path)).reset_index(drop=True).copy()
        for column in self.columns:
            if column.kind == "str":
                frame[column.name] = frame[column.name].astype("category")
        with atomic_path(path) as temporary:
            frame.to_parquet(temporary, index=False, compression="zstd")

    def read(self, path: str | Path) -> pd.DataFrame:
        """Read and check; text columns come back as categories."""
        path = Path(path)
        if not path.exists():
            raise UserError("file not found", where=str(path), fix="run the rule that makes it")
        return self.check(pd.read_parquet(path), str(path))

    def concatenate(self, parts: Sequence[str | Path], path: str | Path) -> None:
        """Read tables of this contract and write their rows as one, in the order given."""
        frames = [self.read(part) for part in parts]
        text = [column.name for column in self.columns if column.kind == "str"]
        whole = pd.concat([frame.astype(dict.fromkeys(text, "str")) for frame in frames], ignore_index=True)
        self.write(whole, path)

    def markdown(self) -> str:
        """The contract as a Markdown table for the docs."""
        rows = [f"| `{c.name}` | {c.kind}{' or missing' if c.missing else ''} | {c.unit} | {c.meaning} |" for c in self.columns]
        return "\n".join([f"### `{self.name}`", "", self.meaning, "", "| column | type | unit | meaning |", "|---|---|---|---|", *rows, ""])
