"""Which gene sets the clusters of perturbations and of genes are enriched in: a report of what was learned, used for no prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from dbdiffusion.config.datasets import FeatureSource
from dbdiffusion.data.splits import parts
from dbdiffusion.inference.ttest import benjamini_hochberg
from dbdiffusion.perturbations.features import gmt_descriptions, match_symbols, read_aliases, read_gmt
from dbdiffusion.runtime import contracts

MIN_OVERLAP = 2  # members of a set in the universe, and of the overlap that is reported
COLUMNS = ["cluster", "set", "overlap", "cluster_size", "set_size", "universe", "fold", "p", "q", "members"]


def enrich(clusters: Mapping[str, str], sets: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Hypergeometric test of every cluster against every set, adjusted over all of them (Benjamini and Hochberg 1995).

    clusters: gene -> cluster; sets: name -> genes. The universe are the clustered genes that are in some set: a gene that nobody
    annotated says nothing. Sets with fewer than MIN_OVERLAP members there cannot be tested; sets with the same members there are one
    test, under each of their names. p = P(overlap at least as large) for a
    cluster drawn at random. Rows: overlaps of MIN_OVERLAP and more, all of `COLUMNS`; fold: overlap over the one expected.
    """
    inside = {name: sorted(set(genes) & clusters.keys()) for name, genes in sets.items()}
    genes = sorted({gene for members in inside.values() for gene in members})
    tested = {name: members for name, members in inside.items() if len(members) >= MIN_OVERLAP}
    labels = sorted({clusters[gene] for gene in genes}, key=lambda label: (len(label), label))
    if not tested:
        return pd.DataFrame({name: pd.Series(dtype=object if name in ("cluster", "set", "members") else float) for name in COLUMNS})
    cluster_of = pd.Index(labels).get_indexer([clusters[gene] for gene in genes])
    row = {gene: number for number, gene in enumerate(genes)}
    overlap = np.array([np.bincount(cluster_of[[row[gene] for gene in members]], minlength=len(labels)) for members in tested.values()])
    set_size, cluster_size = overlap.sum(axis=1), np.bincount(cluster_of, minlength=len(labels))
    p = stats.hypergeom.sf(overlap - 1, len(genes), set_size[:, None], cluster_size[None])
    _, first, same = np.unique([",".join(members) for members in tested.values()], return_index=True, return_inverse=True)
    q = benjamini_hochberg(np.minimum(p[first], 1.0).ravel()).reshape(len(first), -1)[same]
    names, records = list(tested), []
    for at, label in zip(*np.nonzero(overlap >= MIN_OVERLAP), strict=True):
        members = [gene for gene in tested[names[at]] if clusters[gene] == labels[label]]
        expected = set_size[at] * cluster_size[label] / len(genes)
        found = (overlap[at, label], cluster_size[label], set_size[at], len(genes))
        record = (labels[label], names[at], *map(int, found), overlap[at, label] / expected, p[at, label], q[at, label], ", ".join(members))
        records.append(record)
    return pd.DataFrame(records, columns=COLUMNS).sort_values(["p", "cluster", "set"], ignore_index=True)


def write_enrichment(*, clusters: str | Path, sources: Sequence[FeatureSource], aliases: str | None, out: str | Path) -> None:
    """Write contract `enrichment`: both kinds of clusters in the gene sets of each source of kind gene_sets.

    Perturbation clusters count single perturbations, by their genes. Only sets that the source uses (min_size to max_size) are tested.
    """
    table = contracts.CLUSTERS.read(clusters).astype({"kind": str, "name": str, "cluster": str})
    other_names = read_aliases(aliases) if aliases else {}
    frames = []
    for source in (source for source in sources if source.kind == "gene_sets"):
        sets = {name: genes for name, genes in read_gmt(source.path).items() if source.min_size <= len(genes) <= source.max_size}
        descriptions = gmt_descriptions(source.path)
        available = sorted({gene for genes in sets.values() for gene in genes})
        for kind, rows in table.groupby("kind", sort=True):
            of = {name: cluster for name, cluster in zip(rows["name"], rows["cluster"], strict=True) if len(parts(name)) == 1}
            match, _ = match_symbols(sorted(of), available, other_names)
            found = enrich({theirs: of[ours] for ours, theirs in match.items()}, sets)
            frames.append(found.assign(kind=kind, source=source.name, description=[descriptions[name] for name in found["set"]]))
    integers = dict.fromkeys(("overlap", "cluster_size", "set_size", "universe"), np.int64)
    whole = pd.concat(frames, ignore_index=True).astype(integers | dict.fromkeys(("fold", "p", "q"), float))
    contracts.ENRICHMENT.write(whole, out)
