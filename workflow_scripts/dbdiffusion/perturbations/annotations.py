"""Public gene annotations: the table `resources/annotations.tsv`, and the files as published in the layouts that feature sources read.

Gene sets are written as .gmt (identifier, name, genes), pairs as .csv (entity1, entity2), both with gene symbols and sorted.
"""

from __future__ import annotations

import csv
import gzip
import io
import logging
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TextIO

from dbdiffusion.runtime.errors import UserError, nearest
from dbdiffusion.runtime.files import atomic_path

logger = logging.getLogger(__name__)

TABLE = Path(__file__).resolve().parents[3] / "resources" / "annotations.tsv"
SUFFIXES = {"gene_sets": ".gmt", "pairs": ".csv"}
FORMATS = {r"gaf:[PCF]": ("gene_sets", 2), r"gmt\.zip": ("gene_sets", 1), r"string:\d+": ("pairs", 2)}
"""Pattern of a format -> the kind it gives and its number of files."""
NAMESPACES = {"P": "biological_process", "C": "cellular_component", "F": "molecular_function"}
GAF_COLUMNS = 15  # columns that a line of an annotation file has at least (17 since version 2.0)
MAX_UNKNOWN = 0.1  # share of annotations to terms that the ontology lacks above which the two files do not belong together


# --- the table ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Annotation:
    """One row of the table.

    name: also of the file made from it; kind: gene_sets or pairs; format: gaf:ASPECT, gmt.zip or string:MINIMUM SCORE; address, sha256:
    joined by `;`, the latter may be empty; version, licence, citation: as known; note.
    """

    name: str
    version: str
    kind: str
    format: str
    address: str
    sha256: str
    licence: str
    citation: str
    note: str

    @property
    def urls(self) -> list[str]:
        """Addresses of its files."""
        return self.address.split(";")

    @property
    def files(self) -> list[str]:
        """Names of its downloaded files: what addresses end in."""
        return [url.rsplit("/", 1)[-1] for url in self.urls]

    @property
    def checksums(self) -> list[str | None]:
        """Published checksums of its files, None where there is none."""
        return [c or None for c in self.sha256.split(";")] if self.sha256 else [None] * len(self.urls)

    @property
    def output(self) -> str:
        """Name of the file made from it."""
        return self.name + SUFFIXES[self.kind]


def read_annotations(path: str | Path = TABLE) -> dict[str, Annotation]:
    """All rows by the name of the file made from them, in the order of the table.

    Raises UserError when the file is missing, its columns are others, or a row is incomplete, repeated or impossible.
    """
    path = Path(path)
    if not path.exists():
        raise UserError("file not found", where=str(path), fix="restore resources/annotations.tsv from the repository")
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    names = [field.name for field in fields(Annotation)]
    if not rows or rows[0] != names:
        found = f"columns are {rows[0] if rows else []}, expected {names}"
        raise UserError(found, where=str(path), fix="name the columns so, in this order, separated by tabs")
    out: dict[str, Annotation] = {}
    for number, row in enumerate(rows[1:], start=1):
        where = f"{path}, row {number} ({row[0] if row else ''})"
        if len(row) != len(names):
            raise UserError(f"{len(row)} fields, expected {len(names)}", where=where, fix="separate fields by one tab, empty ones too")
        entry = Annotation(*(value.strip() for value in row))
        _check(entry, where)
        if entry.output in out:
            raise UserError(f"{entry.name!r} stands twice", where=where, fix="give each row a name of its own")
        out[entry.output] = entry
    files_of(out.values())
    return out


def files_of(entries: Iterable[Annotation]) -> dict[str, tuple[str, str | None]]:
    """Downloaded file -> (address, checksum or None). Raises UserError for a file name with two addresses or checksums."""
    out: dict[str, tuple[str, str | None]] = {}
    for entry in entries:
        for file, url, checksum in zip(entry.files, entry.urls, entry.checksums, strict=True):
            if out.setdefault(file, (url, checksum)) != (url, checksum):
                found = f"two addresses or checksums of a file {file!r}"
                raise UserError(
                    found, where=f"annotation {entry.name!r}", fix="write the same ones in all rows, or use files of other names"
                )
    return out


def _check(entry: Annotation, where: str) -> None:
    """The values of one row."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", entry.name):
        raise UserError(f"name {entry.name!r}", where=where, fix="use letters, digits, - and _")
    known = next((value for pattern, value in FORMATS.items() if re.fullmatch(pattern, entry.format)), None)
    if known is None:
        raise UserError(f"unknown format {entry.format!r}", where=where, fix="use gaf:P, gaf:C, gaf:F, gmt.zip or string:MINIMUM SCORE")
    kind, count = known
    if entry.kind != kind:
        raise UserError(f"format {entry.format!r} gives {kind}, not {entry.kind!r}", where=where, fix=f"set kind to {kind}")
    if len(entry.urls) != count or len(entry.checksums) != count:
        raise UserError(
            f"{len(entry.urls)} address(es) and {len(entry.checksums)} checksum(s), expected {count}", where=where, fix="join by ;"
        )
    for url in entry.urls:
        if not re.fullmatch(r"https?://[^\s/]+/(?:[^\s/]+/)*[\w.-]+", url):
            raise UserError(f"not the web address of a file: {url!r}", where=where, fix="give an http(s) address that ends in a file name")
    for checksum in entry.checksums:
        if checksum and not re.fullmatch(r"[0-9a-fA-F]{64}", checksum):
            raise UserError(f"not a SHA-256: {checksum!r}", where=where, fix="64 hexadecimal digits, or leave it empty")


# --- Gene Ontology -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Term:
    """A term of an ontology: name, namespace, and the terms it is_a or is part_of."""

    name: str
    namespace: str
    parents: tuple[str, ...]


def read_obo(lines: Iterable[str], where: str = "ontology") -> tuple[dict[str, Term], dict[str, str]]:
    """Terms of an OBO file (obsolete ones left out), and alternative identifier -> identifier."""
    terms: dict[str, Term] = {}
    aliases: dict[str, str] = {}
    for tags in _stanzas(lines):
        if "id" not in tags or tags.get("is_obsolete") == ["true"]:
            continue
        identifier = tags["id"][0]
        parents = [value.split()[0] for value in tags.get("is_a", [])]
        parents += [value.split()[1] for value in tags.get("relationship", []) if value.split()[0] == "part_of"]
        terms[identifier] = Term(tags.get("name", [identifier])[0], tags.get("namespace", [""])[0], tuple(parents))
        aliases |= dict.fromkeys(tags.get("alt_id", []), identifier)
    if not terms:
        raise UserError("there is no [Term] in it", where=where, fix="fetch the ontology in OBO format (go-basic.obo)")
    return terms, aliases


def _stanzas(lines: Iterable[str]) -> Iterator[dict[str, list[str]]]:
    """Tag -> values of each [Term], without trailing comments."""
    tags: dict[str, list[str]] | None = None
    for line in lines:
        line = line.strip()
        if line.startswith("["):
            if tags:
                yield tags
            tags = {} if line == "[Term]" else None
        elif tags is not None and ": " in line:
            tag, value = line.split(": ", 1)
            tags.setdefault(tag, []).append(value.split(" ! ")[0].strip())
    if tags:
        yield tags


def ancestors(terms: dict[str, Term]) -> dict[str, frozenset[str]]:
    """Term -> itself and all terms above it. Raises UserError when the ontology has a circle."""
    done: dict[str, frozenset[str]] = {}
    for start in terms:
        open_terms, trail = [start], set()
        while open_terms:
            term = open_terms[-1]
            parents = [parent for parent in terms[term].parents if parent in terms]
            left = [parent for parent in parents if parent not in done]
            if term in done or not left:
                done.setdefault(term, frozenset([term]).union(*(done[parent] for parent in parents)))
                trail.discard(open_terms.pop())
                continue
            if term in trail:
                raise UserError(f"term {term} is above itself", where="ontology", fix="use go-basic.obo, which has no circles")
            trail.add(term)
            open_terms += left
    return done


def read_gaf(lines: Iterable[str], where: str = "annotations") -> Iterator[tuple[str, str]]:
    """(gene symbol, term) of each line of a GO annotation file that states something of a gene product: neither those with NOT nor
    those without data (evidence ND), nor those of complexes. Raises UserError for a line with too few columns."""
    for number, line in enumerate(lines, 1):
        if line.startswith("!") or not line.strip():
            continue
        row = line.rstrip("\r\n").split("\t")
        if len(row) < GAF_COLUMNS:
            found = f"line {number} has {len(row)} tab-separated fields, expected 17: {line[:60]!r}"
            raise UserError(found, where=where, fix="fetch an annotation file in GAF 2 format")
        database, symbol, relation, term, evidence = row[0], row[2], row[3], row[4], row[6]
        if "NOT" not in relation.split("|") and evidence != "ND" and database != "ComplexPortal" and symbol:
            yield symbol, term


def go_sets(gaf: Iterable[str], obo: Iterable[str], aspect: str) -> list[tuple[str, str, list[str]]]:
    """(term, name, genes) of one aspect (P, C or F): a gene is in the terms it is annotated to and in all above them, by is_a and
    part_of, which may lead from a function to the process it is part of (true path rule)."""
    terms, aliases = read_obo(obo)
    above = ancestors(terms)
    genes: dict[str, set[str]] = {}
    n = unknown = 0
    for symbol, term in read_gaf(gaf):
        found, n = aliases.get(term, term), n + 1
        unknown += found not in terms
        for upper in above.get(found, ()):
            if terms[upper].namespace == NAMESPACES[aspect]:
                genes.setdefault(upper, set()).add(symbol)
    if not n or unknown > MAX_UNKNOWN * n:
        found = f"{unknown} of {n} annotations are to terms that the ontology does not have"
        raise UserError(found, where="Gene Ontology files", fix="fetch annotations and ontology again, of the same release")
    logger.info("%d annotations, %d of them to terms unknown to the ontology; %d sets", n, unknown, len(genes))
    return [(term, terms[term].name, sorted(members)) for term, members in sorted(genes.items())]


# --- Reactome and STRING -----------------------------------------------------------------------------------------------


def gmt_sets(lines: Iterable[str]) -> list[tuple[str, str, list[str]]]:
    """(identifier, name, genes) of Reactome's .gmt, whose lines start with the name."""
    sets = []
    for number, line in enumerate(lines, 1):
        row = [field.strip() for field in line.rstrip("\r\n").split("\t")]
        if len(row) < 3:
            if any(row):
                fix = "fetch the file again"
                raise UserError(
                    f"line {number} has {len(row)} tab-separated field(s), expected name, identifier and genes", where="gmt", fix=fix
                )
            continue
        sets.append((row[1], row[0], sorted({gene for gene in row[2:] if gene})))
    if not sets:
        raise UserError("there is no gene set in it", where="gmt", fix="fetch the file again")
    return sorted(sets)


def string_pairs(links: Iterable[str], names: Iterable[str], minimum: int) -> list[tuple[str, str]]:
    """Pairs of symbols, each once and in order, of STRING's links with a combined score of at least `minimum` (0-1000).

    links: protein1, protein2, combined_score by spaces; names: string_protein_id, preferred_name, ... by tabs; both with a header.
    """
    rows = (line.rstrip("\r\n").split("\t") for line in names if not line.startswith("#"))
    symbol = {row[0]: row[1] for row in rows if len(row) > 1 and row[1]}
    links = iter(links)
    header = next(links, "").split()
    if header != ["protein1", "protein2", "combined_score"] or not symbol:
        found = f"links start with {header}; {len(symbol)} proteins have a name"
        raise UserError(found, where="STRING files", fix="fetch protein.links and protein.info of the same version")
    pairs, strong, unnamed = set(), 0, 0
    for line in links:
        left, right, score = line.split()
        if int(score) < minimum:
            continue
        strong += 1
        if left not in symbol or right not in symbol:
            unnamed += 1
        elif symbol[left] != symbol[right]:
            pairs.add((min(symbol[left], symbol[right]), max(symbol[left], symbol[right])))
    if not pairs or unnamed > MAX_UNKNOWN * strong:
        found = f"of {strong} links with a score of at least {minimum}, {unnamed} have a protein without a name"
        raise UserError(found, where="STRING files", fix="fetch protein.links and protein.info of the same version")
    logger.info("%d pairs of genes from %d links with a score of at least %d", len(pairs), strong, minimum)
    return sorted(pairs)


# --- the stage ---------------------------------------------------------------------------------------------------------


def write_annotation(*, table: str | Path, name: str, files: Sequence[str | Path], out: str | Path) -> None:
    """The downloaded files of one annotation (`name` as in `read_annotations`) in the layout that feature sources read.

    files: in the order of the table's addresses. Raises UserError for a name that is not in the table and for files that are not
    what they should be.
    """
    entries = read_annotations(table)
    if name not in entries:
        raise UserError(f"no annotation {name!r}", where=str(table), fix=nearest(name, entries))
    kind, _, option = entries[name].format.partition(":")
    try:
        if kind == "string":
            with _text(files[0]) as links, _text(files[1]) as names:
                lines = ["entity1,entity2", *(",".join(pair) for pair in string_pairs(links, names, int(option)))]
        else:
            lines = ["\t".join([identifier, title, *genes]) for identifier, title, genes in _sets(kind, option, files)]
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        where = ", ".join(str(file) for file in files)
        raise UserError(f"cannot be read ({error})", where=where, fix="remove the files, and fetch them again") from error
    with atomic_path(out) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _sets(kind: str, option: str, files: Sequence[str | Path]) -> list[tuple[str, str, list[str]]]:
    if kind == "gaf":
        with _text(files[0]) as gaf, _text(files[1]) as obo:
            return go_sets(gaf, obo, option)
    with zipfile.ZipFile(files[0]) as archive:
        members = [member for member in archive.namelist() if member.endswith(".gmt")]
        if len(members) != 1:
            raise UserError(f"it holds {archive.namelist()}, expected one .gmt", where=str(files[0]), fix="fetch the file again")
        with archive.open(members[0]) as handle:
            return gmt_sets(io.TextIOWrapper(handle, encoding="utf-8"))


@contextmanager
def _text(path: str | Path) -> Iterator[TextIO]:
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as handle:
        yield handle
