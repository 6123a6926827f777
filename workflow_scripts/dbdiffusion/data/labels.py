"""Perturbation labels in the usual dialects, made into one: `control`, `GENE`, `GENE1+GENE2` (sorted)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from dbdiffusion.config.datasets import Labels
from dbdiffusion.data.sets import CONTROL
from dbdiffusion.runtime.errors import UserError, nearest

JOIN = "+"
"""Separator of combinations in every file of the workflow."""
KEPT, UNASSIGNED, DROPPED, MULTI = "kept", "unassigned", "dropped_label", "multi_guide"
_NO_LABEL = {"", "nan", "none", "na", "<na>", "n/a", "null"}
# Separators that a label may be written with although the config names another. A single hyphen is not
# among them: readthrough genes (ABHD14A-ACY1) join two symbols with one.
_USUAL_SEPARATORS = ("+", "_", ",", ";", "|", "&", "--")


def is_missing(value: object) -> bool:
    """Whether a cell of a table says nothing: NaN, None, empty or a spelled-out NA."""
    return value is None or value is pd.NA or value != value or str(value).strip().casefold() in _NO_LABEL


@dataclass(frozen=True)
class Parsed:
    """One label understood: the genes it names (sorted, none for control) or why its cells are dropped."""

    status: str
    genes: tuple[str, ...] = ()
    collapsed: bool = False

    @property
    def name(self) -> str:
        """Canonical label; empty when the cells are dropped."""
        return (JOIN.join(self.genes) or CONTROL) if self.status == KEPT else ""


@dataclass(frozen=True)
class LabelParser:
    """Understands labels by the config block `labels`.

    genes: symbols known to be one gene although they contain a separator (var_names of the file).

    Rules, in this order:
    missing -> unassigned; listed under `drop` -> dropped; listed under `control` (whole, any case) -> control;
    a known gene as a whole -> that gene; `pattern`, where it fits, replaces the label by its first group (a control there
    is a control); else split at `multi_guide_separator`, then at `combination_separator`.
    Controls beside a gene and repeats of a gene fall away. What was split only by the combination separator
    and still names several genes is a combination; what was split by the multi-guide separator is a multi-guide cell.
    Where both separators are the same string, cells with several genes are combinations.

    Raises UserError when a label is listed both as control and under `drop`.
    """

    labels: Labels
    genes: Collection[str] = ()
    _controls: frozenset[str] = field(init=False, repr=False)
    _drop: frozenset[str] = field(init=False, repr=False)
    _known: frozenset[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        controls = frozenset(c.strip().casefold() for c in self.labels.control)
        drop = frozenset(d.strip().casefold() for d in self.labels.drop)
        if both := sorted(controls & drop):
            raise UserError(
                f"{both} listed both as control and to be dropped", where="config key labels", fix="name each label in one of the two lists"
            )
        object.__setattr__(self, "_controls", controls)
        object.__setattr__(self, "_drop", drop)
        object.__setattr__(self, "_known", frozenset(self.genes))

    def _is_known(self, text: str) -> bool:
        return text in self._known or text.casefold() in self._controls or text.casefold() in self._drop

    def _split(self, text: str, separator: str | None) -> list[str]:
        """Parts of a label; neighbouring parts that together are a known name stay one (longest first)."""
        if not separator or separator not in text or self._is_known(text):
            return [text]
        pieces, parts, i = text.split(separator), [], 0
        while i < len(pieces):
            for j in range(len(pieces), i, -1):
                joined = separator.join(pieces[i:j])
                if j == i + 1 or self._is_known(joined):
                    parts.append(joined.strip())
                    i = j
                    break
        return [part for part in parts if part]

    def parse(self, label: object) -> Parsed:
        """Understand one label."""
        text = "" if label is None else str(label).strip()
        if text.casefold() in self._drop:
            return Parsed(DROPPED)
        if text.casefold() in self._controls:
            return Parsed(KEPT)
        if is_missing(label):
            return Parsed(UNASSIGNED)
        if self.labels.pattern and text not in self._known and (fit := re.fullmatch(self.labels.pattern, text)):
            text = fit.group(1) or ""
        multi, combination = self.labels.multi_guide_separator, self.labels.combination_separator
        groups = self._split(text, multi if multi != combination else None)
        parts = [part for group in groups for part in self._split(group, combination)]
        if not parts:
            return Parsed(UNASSIGNED)
        if any(part.casefold() in self._drop for part in parts):
            return Parsed(DROPPED)
        genes = tuple(sorted({part for part in parts if part.casefold() not in self._controls}))
        if len(groups) > 1 and len(genes) > 1:
            return Parsed(MULTI)
        return Parsed(KEPT, genes, collapsed=len(parts) > max(len(genes), 1))


@dataclass(frozen=True)
class LabelResult:
    """names: (n_cells,) canonical labels, empty where the cell is dropped; status: (n_cells,) kept, unassigned,
    dropped_label or multi_guide; report: counts for the record."""

    names: np.ndarray
    status: np.ndarray
    report: dict[str, Any]


def require_column(frame: pd.DataFrame, name: str, *, where: str, key: str) -> pd.Series:
    """A column of a cell or guide table. Raises UserError naming the nearest column when it is absent."""
    if name not in frame.columns:
        raise UserError(
            f"there is no column {name!r} (config key {key}); columns: {', '.join(map(str, frame.columns)) or 'none'}",
            where=where,
            fix=nearest(name, map(str, frame.columns)),
        )
    return frame[name]


def canonical_labels(raw: pd.Series, labels: Labels, *, genes: Collection[str] = (), where: str) -> LabelResult:
    """Canonical labels of all cells.

    raw: (n_cells,) labels as they stand in the file; genes: measured gene symbols; where: file and column, for messages.

    Raises UserError when no cell is a control, no cell is perturbed, or labels are evidently joined by a separator
    that the config does not name.
    """
    parser = LabelParser(labels, genes)
    codes, distinct = pd.factorize(raw, use_na_sentinel=False)
    counts = np.bincount(codes, minlength=len(distinct))
    parsed = [parser.parse(None if is_missing(value) and not isinstance(value, str) else value) for value in distinct]
    frequency = {value: int(n) for value, n in zip(distinct, counts, strict=True)}
    _check_names(distinct, parsed, parser, where)
    _check_groups(parsed, frequency, labels, where)
    names = np.array([p.name for p in parsed], dtype=object)[codes]
    status = np.array([p.status for p in parsed], dtype=object)[codes]
    return LabelResult(names, status, _report(distinct, parsed, counts))


def _report(distinct: Collection[Hashable], parsed: list[Parsed], counts: np.ndarray) -> dict[str, Any]:
    """How many cells (and labels) went which way, with the most frequent dropped labels."""
    cells: Counter[str] = Counter()
    gone: dict[str, Counter[str]] = {UNASSIGNED: Counter(), DROPPED: Counter(), MULTI: Counter()}
    for value, p, n in zip(distinct, parsed, counts, strict=True):
        cells[p.status] += int(n)
        cells["collapsed"] += int(n) if p.collapsed else 0
        if p.status != KEPT:
            gone[p.status][str(value)] += int(n)
    kept = {p.name for p in parsed if p.status == KEPT}
    combinations = sum(JOIN in name for name in kept)
    return {
        "cells": int(counts.sum()),
        "cells_kept": cells[KEPT],
        "cells_control": int(sum(n for p, n in zip(parsed, counts, strict=True) if p.name == CONTROL)),
        "cells_unassigned": cells[UNASSIGNED],
        "cells_dropped_label": cells[DROPPED],
        "cells_multi_guide": cells[MULTI],
        "cells_collapsed": cells["collapsed"],
        "singles": len(kept - {CONTROL}) - combinations,
        "combinations": combinations,
        "dropped_labels": {status: _top(counter) for status, counter in gone.items() if counter},
    }


def _top(counter: Counter[str], n: int = 10) -> dict[str, int]:
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:n])


def _check_names(distinct: Collection[Hashable], parsed: list[Parsed], parser: LabelParser, where: str) -> None:
    """Labels that would be misread: `control` and `+` are reserved, and parts that are labels themselves betray a combination."""
    named = {p.genes[0] for p in parsed if p.status == KEPT and len(p.genes) == 1}
    for value, p in zip(distinct, parsed, strict=True):
        for gene in p.genes:
            if gene.casefold() == CONTROL:
                raise UserError(
                    f"label {value!r} stands for control cells here, but is not listed under labels.control {parser.labels.control}",
                    where=where,
                    fix="add it to labels.control, or to labels.drop",
                )
            if JOIN in gene:
                raise UserError(
                    f"label {value!r} holds {JOIN!r}, which stands for combinations here, but labels.combination_separator is "
                    f"{parser.labels.combination_separator!r}",
                    where=where,
                    fix=f"set labels.combination_separator: {JOIN!r}, or labels.multi_guide_separator: {JOIN!r} to drop such cells",
                )
    # combination_separator: null says that there are no combinations, so that a joined label is a name.
    if parser.labels.combination_separator is None:
        return
    found: dict[str, list[str]] = {}
    for p in parsed:
        for gene in p.genes:
            for separator in _USUAL_SEPARATORS:
                parts = gene.split(separator)
                if len(parts) > 1 and gene not in parser._known and all(_is_label(part, named, parser) for part in parts):
                    found.setdefault(separator, []).append(gene)
    if found:
        separator = max(found, key=lambda s: (len(found[s]), s))
        examples = ", ".join(map(repr, sorted(set(found[separator]))[:3]))
        raise UserError(
            f"{len(set(found[separator]))} label(s) join other labels of the file by {separator!r}, e.g. {examples}, but "
            f"labels.combination_separator is {parser.labels.combination_separator!r}",
            where=where,
            fix=f"set labels.combination_separator: {separator!r} (combinations), labels.multi_guide_separator: {separator!r} "
            "(cells to drop), or labels.combination_separator: null if these are names",
        )


def _is_label(part: str, named: set[str], parser: LabelParser) -> bool:
    return part in named or part.casefold() in parser._controls


def _check_groups(parsed: list[Parsed], frequency: dict[Hashable, int], labels: Labels, where: str) -> None:
    """There must be control cells and perturbed cells."""
    kept = {p.name for p in parsed if p.status == KEPT}
    frequent = _top(Counter({str(value): n for value, n in frequency.items()}), 8)
    shown = ", ".join(f"{value!r} ({n} cells)" for value, n in frequent.items())
    if CONTROL not in kept:
        hints = {hint for c in labels.control if (hint := nearest(c, map(str, frequency))).startswith("did you mean")}
        raise UserError(
            f"no cell has a control label; expected one of {labels.control}; most frequent labels: {shown}",
            where=where,
            fix="name the control label under labels.control" + ("; " + "; ".join(sorted(hints)) if hints else ""),
        )
    if kept == {CONTROL}:
        raise UserError(
            f"there is no perturbed cell: every label is a control or dropped; most frequent labels: {shown}",
            where=where,
            fix="check columns.perturbation, labels.control and labels.drop",
        )
