"""The table of public screens, `resources/datasets.tsv`: typed rows, and the config values they imply."""

from __future__ import annotations

import csv
import re
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path

from dbdiffusion.config.datasets import CatalogueDataset, Columns, Labels
from dbdiffusion.runtime.errors import UserError, nearest

TABLE = Path(__file__).resolve().parents[3] / "resources" / "datasets.tsv"
SUFFIXES = {"h5ad": ".h5ad", "h5mu": ".h5mu", "seurat_rds": ".rds"}
"""Formats of the table and the suffix of the downloaded file; seurat_rds needs the conversion rule."""
_REQUIRED = ("name", "version", "format", "address", "licence", "citation", "perturbation_column", "control")


@dataclass(frozen=True)
class Entry:
    """One version of a public screen.

    name, version: the key; format: h5ad, h5mu (modality `rna`) or seurat_rds; address, archive: where the same file is
    served (archive may be empty); sha256: published checksum, or empty; size: note; licence, citation: as known;
    perturbation_column, guide_column, batch_column: columns of its cell table (the latter two may be empty);
    control, drop: labels joined by `;`; combination_separator, multi_guide_separator, label_pattern: as in the config
    block `labels`, empty for none; note.
    """

    name: str
    version: str
    format: str
    address: str
    archive: str
    sha256: str
    size: str
    licence: str
    citation: str
    perturbation_column: str
    guide_column: str
    batch_column: str
    control: str
    combination_separator: str
    multi_guide_separator: str
    drop: str
    label_pattern: str
    note: str

    @property
    def urls(self) -> list[str]:
        """Addresses in order of preference."""
        return [url for url in (self.address, self.archive) if url]

    @property
    def suffix(self) -> str:
        """Suffix of the downloaded file."""
        return SUFFIXES[self.format]

    @property
    def needs_conversion(self) -> bool:
        """Whether the download goes through `convert_seurat.R` before ingest."""
        return self.format == "seurat_rds"


def read_catalogue(path: str | Path = TABLE) -> dict[tuple[str, str], Entry]:
    """All rows by (name, version), in the order of the table.

    Raises UserError when the file is missing, columns are missing or unknown, or a row is incomplete, repeated,
    or has an unknown format, a malformed address, checksum or pattern.
    """
    path = Path(path)
    if not path.exists():
        raise UserError("file not found", where=str(path), fix="restore resources/datasets.tsv from the repository")
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    header, names = rows[0] if rows else [], [f.name for f in fields(Entry)]
    for name in names:
        if name not in header:
            raise UserError(f"column {name!r} is missing", where=str(path), fix=f"tab-separated columns are {', '.join(names)}")
    if unknown := [name for name in header if name not in names]:
        raise UserError(f"unknown column {unknown[0]!r}", where=str(path), fix=nearest(unknown[0], names))
    entries: dict[tuple[str, str], Entry] = {}
    for number, row in enumerate(rows[1:], start=1):
        where = f"{path}, row {number} ({row[0] if row else ''})"
        if len(row) != len(header):
            raise UserError(f"{len(row)} fields, expected {len(header)}", where=where, fix="separate fields by one tab, empty ones too")
        entry = Entry(**{name: value.strip() for name, value in zip(header, row, strict=True)})
        _check(entry, where)
        if (entry.name, entry.version) in entries:
            raise UserError(
                f"version {entry.version!r} of {entry.name!r} stands twice", where=where, fix="give each row a version of its own"
            )
        entries[entry.name, entry.version] = entry
    return entries


def _check(entry: Entry, where: str) -> None:
    """The values of one row."""
    for name in _REQUIRED:
        if not getattr(entry, name):
            raise UserError(f"{name!r} is empty", where=where, fix="fill it in (licence: see source, where unknown)")
    if entry.format not in SUFFIXES:
        raise UserError(f"unknown format {entry.format!r}", where=where, fix=nearest(entry.format, SUFFIXES))
    for url in entry.urls:
        if not re.match(r"https?://[^\s/]+/", url):
            raise UserError(f"not a web address: {url!r}", where=where, fix="give an http(s) address")
    if entry.sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", entry.sha256):
        raise UserError(f"not a SHA-256: {entry.sha256!r}", where=where, fix="64 hexadecimal digits, or leave it empty")
    try:
        groups = re.compile(entry.label_pattern).groups
    except re.error as error:
        raise UserError(f"label_pattern is no regular expression: {error}", where=where, fix="mend or empty it") from error
    if entry.label_pattern and groups < 1:
        raise UserError("label_pattern has no group", where=where, fix="put the perturbation into ( )")


def find(path: str | Path, name: str, version: str | None = None) -> Entry:
    """The row of a screen; without a version its last (newest) one.

    Raises UserError naming the nearest name, or the versions there are.
    """
    entries = read_catalogue(path)
    versions = [v for n, v in entries if n == name]
    if not versions:
        names = sorted({n for n, _ in entries})
        raise UserError(f"no public screen {name!r}", where=f"config key datasets.*.name, table {path}", fix=nearest(name, names))
    if version is not None and version not in versions:
        raise UserError(
            f"{name!r} has no version {version!r}; versions: {', '.join(versions)}",
            where=f"config key datasets.*.version, table {path}",
            fix=nearest(version, versions),
        )
    return entries[name, version or versions[-1]]


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(";") if part.strip()]


def with_entry(config: CatalogueDataset, entry: Entry, present: Collection[str]) -> tuple[CatalogueDataset, list[str]]:
    """The dataset's config with what its row says, wherever the user left a default.

    present: columns of the cell table. The guide and batch columns of the row are conveniences: where the file does not
    have them they are left out, and named in the returned list; columns the user named are not touched.
    """
    absent = []

    def convenience(mine: str | None, row: str) -> str | None:
        if mine is not None or not row:
            return mine
        if row not in present:
            absent.append(row)
            return None
        return row

    columns, labels = config.columns, config.labels
    default_columns, default_labels = Columns(), Labels()
    columns = columns.model_copy(
        update={
            "perturbation": entry.perturbation_column if columns.perturbation == default_columns.perturbation else columns.perturbation,
            "guide": convenience(columns.guide, entry.guide_column),
            "batch": convenience(columns.batch, entry.batch_column),
        }
    )
    values = {
        "control": _listed(entry.control),
        "combination_separator": entry.combination_separator or None,
        "multi_guide_separator": entry.multi_guide_separator or None,
        "drop": _listed(entry.drop),
        "pattern": entry.label_pattern or None,
    }
    update = {key: value for key, value in values.items() if getattr(labels, key) == getattr(default_labels, key)}
    return config.model_copy(update={"columns": columns, "labels": labels.model_copy(update=update)}), absent
