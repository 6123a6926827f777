"""Features of genes by which an unmeasured perturbation is placed among measured ones: co-expression, gene sets, graphs, tables.

Every source ends as one matrix whose inner products are similarities of genes (cosines before any truncation). Its axes are
learned from the perturbed genes of the training perturbations (the anchors), so that a target is described by what it has
in common with them and never changes the description of another target.
"""

from __future__ import annotations

import gzip
import logging
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.sparse.linalg import LinearOperator

from dbdiffusion.config.datasets import FeatureSource
from dbdiffusion.config.splits import ALL
from dbdiffusion.data.normalise import TARGET_SUM, load_expression
from dbdiffusion.perturbations.embedding import DENSE_EIGEN, top_eigen
from dbdiffusion.runtime.errors import UserError
from dbdiffusion.runtime.seeds import rng

logger = logging.getLogger(__name__)

CELL_BLOCK = 4096
COEXPRESSION = "coexpression"  # name of the only source that is learned from cells


@dataclass(frozen=True)
class GeneFeatures:
    """Features of one source: genes (n,), values (n, d) whose inner products are similarities; names: of perturbed genes in the source,
    also of those of which nothing is known that is shared with a training perturbation's gene, and which therefore have no features."""

    source: str
    genes: pd.Index
    values: np.ndarray
    names: Mapping[str, str] = field(default_factory=dict, repr=False)

    def rows(self, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(len(names), d) features, zero where the source does not know a gene, and whether it knows it."""
        at = self.genes.get_indexer(pd.Index(names, dtype=object))
        return np.where((at >= 0)[:, None], self.values[at], 0.0), at >= 0

    def to_frame(self, fit: str) -> pd.DataFrame:
        """Rows of contract `gene_features`."""
        n, d = self.values.shape
        return pd.DataFrame(
            {
                "fit": np.repeat(np.array([fit], dtype=object), n * d),
                "source": np.repeat(np.array([self.source], dtype=object), n * d),
                "gene": np.repeat(self.genes.to_numpy(dtype=object), d),
                "dimension": np.tile(np.arange(d), n),
                "value": self.values.astype(float).ravel(),
            }
        )


def of_fit(frame: pd.DataFrame, fit: str) -> dict[str, GeneFeatures]:
    """Features by source name from contract `gene_features` for a fit: `all`, or a cross-fit model, for which a source that has
    rows of models never falls back on those of `all`. A coordinate that is absent is 0."""
    frame = frame.astype({"fit": str, "source": str, "gene": str})
    own = frame["source"].isin(frame.loc[frame["fit"] != ALL, "source"]) & (fit != ALL)
    out = {}
    for source, rows in frame[frame["fit"] == np.where(own, fit, ALL)].groupby("source", sort=True):
        wide = rows.pivot(index="gene", columns="dimension", values="value").fillna(0.0).sort_index()
        out[source] = GeneFeatures(source, pd.Index(wide.index.to_numpy(dtype=object)), wide.to_numpy())
    return out


def nonzero(features: GeneFeatures) -> GeneFeatures:
    """Without the genes of which nothing is known: rows of zeros."""
    keep = np.linalg.norm(features.values, axis=1) > 1e-9
    return replace(features, genes=features.genes[keep], values=features.values[keep])


def known(features: Sequence[GeneFeatures], names: Sequence[str]) -> np.ndarray:
    """(len(names),) whether any of the sources knows the gene."""
    found = [f.rows(names)[1] for f in features]
    return np.any(found, axis=0) if found else np.zeros(len(names), dtype=bool)


def similarity(features: Sequence[GeneFeatures], queries: Sequence[str], measured: Sequence[str]) -> np.ndarray:
    """(R, P) similarity of genes, float32: the mean over the sources that know both, NaN where none does."""
    total = np.zeros((len(queries), len(measured)), dtype=np.float32)
    count = np.zeros_like(total)
    for source in features:
        (left, has_left), (right, has_right) = source.rows(queries), source.rows(measured)
        total += left.astype(np.float32) @ right.astype(np.float32).T
        count += np.outer(has_left, has_right)
    total[count == 0] = np.nan
    return np.divide(total, count, out=total, where=count > 0)


def design(features: Sequence[GeneFeatures], queries: Sequence[str], measured: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Joined features of queries (R, d) and measured genes (P, d): each source centred on the measured genes it knows,
    zero (their mean) for genes it does not know, divided by the square root of the number of sources."""
    left, right = [], []
    for source in features:
        (q, has_q), (m, has_m) = source.rows(queries), source.rows(measured)
        centre = m[has_m].mean(axis=0) if has_m.any() else 0.0
        left.append(np.where(has_q[:, None], q - centre, 0.0))
        right.append(np.where(has_m[:, None], m - centre, 0.0))
    return np.hstack(left) / np.sqrt(len(features)), np.hstack(right) / np.sqrt(len(features))


def permute_features(features: Sequence[GeneFeatures], seed: int) -> list[GeneFeatures]:
    """The same features given to other genes at random, one permutation for all sources: the negative control.

    Which genes a source knows does not change; a gene may get the features of one that other sources do not know.
    """
    out = []
    for source in features:
        order = rng(seed, "permute_features", *sorted(source.genes)).permutation(len(source.genes))
        out.append(GeneFeatures(source.source, source.genes, source.values[order]))
    return out


# --- co-expression -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CellSums:
    """Sums over cells of the products of covariates z (batch indicators, log library) and expression x: they add up over
    groups of cells, so that co-expression without some perturbations costs no second pass. n cells; zz (C, C); zx (C, G); xx (G, G)."""

    n: int
    zz: np.ndarray
    zx: np.ndarray
    xx: np.ndarray

    def __add__(self, other: CellSums) -> CellSums:
        return CellSums(self.n + other.n, self.zz + other.zz, self.zx + other.zx, self.xx + other.xx)


def cell_sums(cells: str | Path, groups: Sequence[Sequence[str]], genes: Sequence[str], max_cells: int, seed: int) -> list[CellSums | None]:
    """CellSums of each group of perturbations (none for a group without cells in the seeded subset of `max_cells` cells).

    Only cells of the named perturbations are read. x is ln(1 + CP10k).
    """
    names = sorted({name for group in groups for name in group})
    expression = load_expression(cells, perturbations=names, genes=list(genes), max_cells=max_cells, seed=seed)
    batches = pd.Categorical(expression.obs["batch"])
    depth = np.log(np.maximum(expression.obs["total_counts"].to_numpy(dtype=float), 1.0))
    # Centred on a constant: a mean over all cells would carry those of one group into the sums of the others.
    covariates = np.column_stack([np.eye(len(batches.categories))[batches.codes], depth - np.log(TARGET_SUM)])
    group_of = {name: number for number, group in enumerate(groups) for name in group}
    code = expression.obs["perturbation"].map(group_of).to_numpy()
    return [_sums(expression.values[code == number], covariates[code == number]) for number in range(len(groups))]


def _sums(values: sparse.csr_matrix, covariates: np.ndarray) -> CellSums | None:
    if not values.shape[0]:
        return None
    n_genes = values.shape[1]
    xx, zx = np.zeros((n_genes, n_genes)), np.zeros((covariates.shape[1], n_genes))
    for start in range(0, values.shape[0], CELL_BLOCK):
        block = values[start : start + CELL_BLOCK].toarray()
        xx += block.T @ block
        zx += covariates[start : start + CELL_BLOCK].T @ block
    return CellSums(values.shape[0], covariates.T @ covariates, zx, xx)


def coexpression(sums: CellSums, dimensions: int) -> np.ndarray:
    """(G, d) loadings of genes on the principal components of the cells' correlation matrix after regression on batch and
    log library size, each component weighted by the square root of its eigenvalue's excess over the Marchenko-Pastur edge
    (1 + sqrt(G / n))², which pure noise does not pass.

    Rows are divided by sqrt(norm² + d / n): unit length for genes with co-expression to speak of, short for those whose
    loadings are sampling noise (variance about 1 / n a component). A gene without variance has a row of zeros.
    """
    fitted = np.linalg.lstsq(sums.zz, sums.zx, rcond=1e-10)[0]
    covariance = sums.xx - sums.zx.T @ fitted
    variance = np.diag(covariance).copy()
    alive = variance > 1e-9 * max(variance.max(), 1e-300)
    sd = np.sqrt(np.where(alive, variance, 1.0))
    correlation = covariance / np.outer(sd, sd)
    correlation[~alive] = 0.0
    correlation[:, ~alive] = 0.0
    values, vectors = top_eigen((correlation + correlation.T) / 2, min(dimensions, max(int(alive.sum()) - 1, 1)))
    excess = values - (1 + np.sqrt(alive.sum() / max(sums.n, 1))) ** 2
    keep = excess > 0
    # Fewer than two components above noise: the two largest, so that a direction remains at all.
    keep[: min(2, len(keep))] = True
    loadings = vectors[:, keep] * np.sqrt(np.maximum(excess[keep], 0.01 * np.maximum(values[keep], 1e-12)))
    loadings[~alive] = 0.0
    return loadings / np.sqrt((loadings**2).sum(axis=1, keepdims=True) + keep.sum() / max(sums.n, 1))


# --- prior knowledge ---------------------------------------------------------------------------------------------------


def load_features(
    source: FeatureSource, anchors: Sequence[str], others: Sequence[str] = (), aliases: Mapping[str, Sequence[str]] | None = None
) -> GeneFeatures | None:
    """Features of a file source for anchors (genes of training perturbations) and other genes (targets).

    aliases: name in use -> other names of the gene, see `match_symbols`. None when the source knows no anchor, so that
    nothing can be located by it (logged). Raises UserError for a file that is not what its kind says, and when it shares no
    symbol at all with the genes asked for.
    """
    path = Path(source.path)
    if not path.is_file():
        raise UserError("file not found", where=str(path), fix=f"correct the path of the {source.kind} source under features")
    reader = {"gene_sets": gene_set_matrix, "pairs": pairs_matrix, "table": table_matrix}[source.kind]
    names, matrix = reader(path, source)
    wanted = sorted(set(anchors) | set(others))
    match, missing = match_symbols(wanted, names, aliases)
    if not match:
        ours, theirs = ", ".join(wanted[:4]), ", ".join(names[:4])
        found = f"it knows none of the {len(wanted)} perturbed genes: the data have {ours}; the file has {theirs}"
        raise UserError(found, where=str(path), fix="use a file with the same kind of gene names as the perturbation labels")
    logger.info("features %s: %d of %d perturbed genes found%s", source.name, len(match), len(wanted), _listed(missing))
    genes = pd.Index(sorted(match), dtype=object)
    rows = matrix[pd.Index(names).get_indexer([match[gene] for gene in genes])]
    anchor = genes.isin(set(anchors))
    if not anchor.any():
        logger.warning("features %s: no gene of a training perturbation is in it, the source is not used", source.name)
        return None
    return nonzero(GeneFeatures(source.name, genes, project(rows, anchor, source.dimensions), match))


def _listed(names: Sequence[str], n: int = 12) -> str:
    return f"; not found: {', '.join(names[:n])}{', ...' if len(names) > n else ''}" if len(names) else ""


def project(rows: np.ndarray | sparse.csr_matrix, anchor: np.ndarray, dimensions: int) -> np.ndarray:
    """Rows (n, T) scaled to unit length and projected on the leading right singular vectors of the anchors' rows.

    With no more anchors than dimensions this is exact: inner products with anchors are cosines. Otherwise one factor brings
    the anchors back to a root-mean-square length of 1. Other genes keep their proportion: a short row means that little of
    what is known of a gene is shared with any anchor.
    """
    rows = _unit_rows(rows)
    basis = rows[anchor]
    rank = min(dimensions, basis.shape[0], basis.shape[1])
    if basis.shape[0] <= basis.shape[1]:
        values, left = top_eigen(_gram(basis), rank)
        axes = basis.T @ (left / np.sqrt(np.maximum(values, 1e-12)))
    else:
        values, axes = top_eigen(_gram(basis.T), rank)
    out = np.asarray(rows @ axes)[:, values > 1e-9 * max(values[0], 1e-12)]
    length = np.sqrt((out[anchor] ** 2).sum(axis=1).mean())
    return out / length if length > 0 else out


def _gram(rows: np.ndarray | sparse.csr_matrix) -> np.ndarray | LinearOperator:
    """rows @ rows.T; of a large sparse matrix only its products with vectors, since it would be dense itself."""
    if not sparse.issparse(rows):
        return rows @ rows.T
    if rows.shape[0] <= DENSE_EIGEN:
        return (rows @ rows.T).toarray()
    rows, columns = rows.tocsr(), rows.T.tocsr()
    return LinearOperator((rows.shape[0], rows.shape[0]), matvec=lambda x: rows @ (columns @ x), dtype=float)


def _unit_rows(rows: np.ndarray | sparse.csr_matrix) -> np.ndarray | sparse.csr_matrix:
    if sparse.issparse(rows):
        length = np.sqrt(np.asarray(rows.multiply(rows).sum(axis=1)).ravel())
        return (sparse.diags_array(np.divide(1.0, length, out=np.zeros_like(length), where=length > 0)) @ rows).tocsr()
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)


def gene_set_matrix(path: Path, source: FeatureSource) -> tuple[list[str], sparse.csr_matrix]:
    """Genes of a .gmt file and their sets: (genes, sets), entry ln(genes / size of the set) where a gene is a member.

    Sets outside min_size .. max_size are left out; of sets with the same members the first is used. The weight is the
    inverse document frequency: sharing a small set says more than sharing a large one.
    """
    sets = read_gmt(path)
    used = {frozenset(genes): None for genes in sets.values() if source.min_size <= len(genes) <= source.max_size}
    if not used:
        found = f"none of its {len(sets)} sets has {source.min_size} to {source.max_size} genes"
        raise UserError(found, where=str(path), fix="change min_size or max_size of the source")
    members = [sorted(genes) for genes in used]
    names = sorted({gene for genes in members for gene in genes})
    at = pd.Index(names)
    rows = np.concatenate([at.get_indexer(genes) for genes in members])
    columns = np.repeat(np.arange(len(members)), [len(genes) for genes in members])
    # +1: a set of all genes says nothing about a gene but must not take the gene out of the source.
    weights = np.log((len(names) + 1) / np.bincount(columns))[columns]
    return names, sparse.csr_matrix((weights, (rows, columns)), shape=(len(names), len(members)))


def read_gmt(path: str | Path) -> dict[str, list[str]]:
    """Gene sets of a .gmt or .gmt.gz file: name -> genes (unique, in order). Lines are name, description, genes, by tabs."""
    sets: dict[str, list[str]] = {}
    for number, line in enumerate(_lines(path), 1):
        fields = line.rstrip("\r\n").split("\t")
        if not line.strip():
            continue
        if len(fields) < 3:
            found = f"line {number} has {len(fields)} tab-separated field(s), expected name, description and genes: {line[:60]!r}"
            raise UserError(found, where=str(path), fix="give a .gmt file for a source of kind gene_sets")
        sets[fields[0]] = list(dict.fromkeys(gene.strip() for gene in fields[2:] if gene.strip()))
    if not sets:
        raise UserError("the file has no gene set", where=str(path), fix="give a .gmt file for a source of kind gene_sets")
    return sets


def gmt_descriptions(path: str | Path) -> dict[str, str]:
    """Second field of each set of a .gmt or .gmt.gz file, by the set's name; the name itself where it is empty."""
    fields = [line.rstrip("\r\n").split("\t") for line in _lines(path) if line.strip()]
    return {field[0]: field[1].strip() or field[0] for field in fields}


def _lines(path: str | Path) -> list[str]:
    opener = gzip.open if str(path).endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as handle:
            return handle.readlines()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        fix = "give a text file, compressed only where its name ends in .gz"
        raise UserError(f"cannot be read as text ({error})", where=str(path), fix=fix) from error


def pairs_matrix(path: Path, source: FeatureSource) -> tuple[list[str], sparse.csr_matrix]:
    """Genes of a graph and their diffusion profiles (genes, genes): S + S², S = D^-1/2 (A + I) D^-1/2.

    Two genes are alike when they interact or share neighbours; the normalisation makes a shared hub count little.
    The file's first two columns are the ends of an edge; direction and further columns are not used.
    """
    frame = _read_table(path, header=None)
    if frame.shape[1] < 2:
        raise UserError(
            f"{frame.shape[1]} column(s), expected two columns of gene symbols", where=str(path), fix="separate them by comma or tab"
        )
    ends = frame.iloc[:, :2].astype(str).to_numpy(dtype=object)
    # A first row whose names occur nowhere else is a header.
    if len(ends) > 1 and not np.isin(ends[0].astype(str), ends[1:].astype(str)).any():
        ends = ends[1:]
    names = sorted(set(ends.ravel()) - {"nan", ""})
    index = pd.Index(names)
    left, right = index.get_indexer(ends[:, 0]), index.get_indexer(ends[:, 1])
    fine = (left >= 0) & (right >= 0)
    size = len(names)
    adjacency = sparse.csr_matrix((np.ones(fine.sum()), (left[fine], right[fine])), shape=(size, size))
    adjacency = ((adjacency + adjacency.T + sparse.eye_array(size)) > 0).astype(float).tocsr()
    degree = np.asarray(adjacency.sum(axis=1)).ravel()
    half = sparse.diags_array(degree**-0.5)
    step = (half @ adjacency @ half).tocsr()
    return names, (step + step @ step).tocsr()


def table_matrix(path: Path, source: FeatureSource) -> tuple[list[str], np.ndarray]:
    """Genes and values (genes, dimensions) of a table, each dimension centred and scaled to unit variance over all its genes.

    .tsv, .csv (gene in the first column), .parquet (gene in the index or the first text column), .npz (arrays genes, values).
    """
    if path.suffix == ".npz":
        names, values = _read_npz(path)
    else:
        frame = _read_table(path, header=0)
        if isinstance(frame.index, pd.RangeIndex):
            frame = frame.set_index(frame.columns[0])
        names = [str(name) for name in frame.index]
        text = [str(c) for c in frame.columns if not pd.api.types.is_numeric_dtype(frame[c])]
        if text or not frame.shape[1]:
            found = f"column(s) {text[:5]} are not numbers" if text else "there is no column of numbers"
            raise UserError(found, where=str(path), fix="give a table with the gene in the first column and numbers in the others")
        values = frame.to_numpy(dtype=float)
    if not np.isfinite(values).all():
        raise UserError("the table has missing or infinite values", where=str(path), fix="remove those genes or fill in their values")
    if len(set(names)) < len(names):
        twice = sorted(pd.Index(names)[pd.Index(names).duplicated()].unique())
        raise UserError(f"gene(s) with several rows: {twice[:5]}", where=str(path), fix="keep one row for each gene")
    spread = values.std(axis=0)
    return names, np.divide(values - values.mean(axis=0), spread, out=np.zeros_like(values), where=spread > 1e-12)


def _read_npz(path: Path) -> tuple[list[str], np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names, values = arrays["genes"], np.asarray(arrays["values"], dtype=float)
    except (KeyError, ValueError, OSError) as error:
        fix = "save arrays `genes` (text, not objects) and `values` (genes x dimensions)"
        raise UserError(f"cannot be read ({error})", where=str(path), fix=fix) from error
    if values.ndim != 2 or len(names) != len(values):
        found = f"genes has shape {names.shape} and values {values.shape}, expected (n,) and (n, d)"
        raise UserError(found, where=str(path), fix="give values one row for each gene")
    return [str(name) for name in names], values


def _read_table(path: Path, header: int | None) -> pd.DataFrame:
    """A .parquet, .csv or .tsv/.txt table, the latter two perhaps compressed by gzip."""
    kind = next((s for s in (".parquet", ".csv", ".tsv", ".txt") if path.name.removesuffix(".gz").endswith(s)), None)
    if kind is None:
        fix = "use .csv, .tsv, .txt (also .gz) or .parquet"
        raise UserError(f"unknown kind of table {path.suffix!r}", where=str(path), fix=fix)
    try:
        if kind == ".parquet":
            return pd.read_parquet(path)
        separator = {".csv": ",", ".tsv": "\t", ".txt": r"\s+"}[kind]
        return pd.read_csv(path, sep=separator, header=header, keep_default_na=header is not None, compression="infer")
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise UserError(f"cannot be read as a table ({error})", where=str(path), fix="check the file and its ending") from error


# --- names -------------------------------------------------------------------------------------------------------------

# Families that HGNC renamed in 2020 because spreadsheets read them as dates; screens and annotations disagree on them.
RENAMED = ((re.compile(r"^MARCHF?(\d+)$"), ("MARCH{}", "MARCHF{}")), (re.compile(r"^SEPT(?:IN)?(\d+)$"), ("SEPT{}", "SEPTIN{}")))
ENSEMBL = re.compile(r"^(ENS[A-Z]*G\d{6,})\.\d+$")


def match_symbols(
    wanted: Iterable[str], available: Sequence[str], aliases: Mapping[str, Sequence[str]] | None = None
) -> tuple[dict[str, str], list[str]]:
    """Names in use -> names of a source, and the names that were not found.

    In this order: the same name; `aliases` (other names of the gene, the first that is there); the name without an ENSEMBL version;
    renamed families (MARCH8, MARCHF8); a dot for a hyphen (R's HLA.A); then all of these without regard to case where that is unambiguous.
    """
    exact = set(available)
    folded: dict[str, str | None] = {}
    for name in available:
        for variant in {name.upper(), ENSEMBL.sub(r"\1", name).upper()}:
            folded[variant] = name if folded.get(variant, name) == name else None
    match, missing = {}, []
    for name in wanted:
        variants = _variants(name, aliases or {})
        found = next((v for v in variants if v in exact), None) or next(
            (folded[v.upper()] for v in variants if folded.get(v.upper())), None
        )
        if found is None:
            missing.append(name)
        else:
            match[name] = found
    return match, missing


def _variants(name: str, aliases: Mapping[str, Sequence[str]]) -> list[str]:
    out = [name, *aliases.get(name, ()), ENSEMBL.sub(r"\1", name)]
    for pattern, forms in RENAMED:
        if found := pattern.match(name.upper()):
            out += [form.format(found.group(1)) for form in forms]
    return [*out, name.replace(".", "-")]


def read_aliases(path: str | Path) -> dict[str, list[str]]:
    """Gene name -> its other names, from a table of two names of one gene a row (config datasets.*.aliases), either of which may be in use.

    Its first two columns count. Raises UserError for a file that is no such table.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError("file not found", where=str(path), fix="correct the path under datasets.<name>.aliases")
    frame = _read_table(path, header=0)
    if frame.shape[1] < 2:
        found = f"{frame.shape[1]} column(s), expected two: names of the same gene"
        raise UserError(found, where=str(path), fix="separate them by comma (.csv) or tab (.tsv), under a header")
    out: dict[str, list[str]] = {}
    for one, two in frame.iloc[:, :2].dropna().astype(str).itertuples(index=False):
        for name, other in ((one.strip(), two.strip()), (two.strip(), one.strip())):
            if name and other and name != other and other not in out.setdefault(name, []):
                out[name].append(other)
    return out


def names_frame(
    sources: Mapping[str, GeneFeatures | None], training: Iterable[str], others: Iterable[str], aliases: Mapping[str, Sequence[str]]
) -> pd.DataFrame:
    """Rows of contract `gene_names`: the genes of training perturbations, and others (targets), in each source (None: it knows none)."""
    training = set(training)
    records = []
    for source, features in sources.items():
        names, used = (features.names, set(features.genes)) if features is not None else ({}, set())
        for gene in sorted(training | set(others)):
            found = names.get(gene, "")
            rule = "missing" if not found else "same" if found == gene else "alias" if found in aliases.get(gene, ()) else "variant"
            role = "training" if gene in training else "target"
            records.append({"source": source, "gene": gene, "role": role, "name": found, "rule": rule, "used": gene in used})
    return pd.DataFrame(records, columns=["source", "gene", "role", "name", "rule", "used"])
