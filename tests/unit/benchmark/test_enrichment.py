"""Enrichment of clusters in gene sets, against a loop, on noise, and as a table and a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy import stats

from dbdiffusion.benchmark.enrichment import enrich, write_enrichment
from dbdiffusion.config.datasets import FeatureSource
from dbdiffusion.figures.enrichment import MAX_ROWS, PER_CLUSTER, draw_enrichment, shown
from dbdiffusion.runtime import contracts

GENES = [f"G{i:02d}" for i in range(40)]
CLUSTERS = {gene: str(i // 10) for i, gene in enumerate(GENES)}
SETS = {"ten": GENES[:10], "mixed": [*GENES[5:8], *GENES[20:24], "ELSEWHERE"], "one": GENES[:1], "all": [*GENES, "OTHER"]}


def test_p_values_match_fisher_and_benjamini_hochberg() -> None:
    table = enrich({**CLUSTERS, "UNKNOWN": "0"}, SETS).set_index(["cluster", "set"])
    assert set(table["universe"]) == {40}
    ps = []
    for name, genes in SETS.items():
        members = set(genes) & set(GENES)
        if len(members) < 2:
            continue
        for label in "0123":
            cluster = {gene for gene in GENES if CLUSTERS[gene] == label}
            both = len(cluster & members)
            square = [[both, len(cluster) - both], [len(members) - both, 40 - len(cluster | members)]]
            ps.append(((label, name), stats.fisher_exact(square, alternative="greater")[1], both))
    adjusted = stats.false_discovery_control([p for _, p, _ in ps])
    for (key, p, both), q in zip(ps, adjusted, strict=True):
        assert (key in table.index) == (both >= 2)
        if both >= 2:
            np.testing.assert_allclose(table.loc[key, ["p", "q"]].astype(float), [p, q], atol=1e-12)
    row = table.loc[("2", "mixed")]
    assert (row["overlap"], row["set_size"], row["cluster_size"], row["members"]) == (4, 7, 10, "G20, G21, G22, G23")
    assert row["fold"] == 4 / (7 * 10 / 40)
    assert enrich(CLUSTERS, {"no": ["X", "Y"]}).empty


def test_sets_with_the_same_members_are_one_test() -> None:
    once = enrich(CLUSTERS, SETS).set_index(["cluster", "set"])["q"]
    twice = enrich(CLUSTERS, {**SETS, "again": [*GENES[:10], "X"], "and again": [*GENES[:10], "Y"]}).set_index(["cluster", "set"])["q"]
    pd.testing.assert_series_equal(once.sort_index(), twice.loc[once.index].sort_index())
    assert twice[("0", "again")] == once[("0", "ten")]


def test_random_sets_are_not_called() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        sets = {f"S{i}": list(rng.choice(GENES, 8, replace=False)) for i in range(30)}
        hits += (enrich(CLUSTERS, sets)["q"] <= 0.05).any()
    assert hits <= 8


def write(tmp_path: Path) -> tuple[Path, list[FeatureSource]]:
    rows = [("gene", gene, CLUSTERS[gene]) for gene in GENES] + [("perturbation", gene, CLUSTERS[gene]) for gene in GENES[:30]]
    rows += [("perturbation", "G00+G01", "0")]
    frame = pd.DataFrame(rows, columns=["kind", "name", "cluster"]).assign(x=0.0, y=0.0)
    contracts.CLUSTERS.write(frame, tmp_path / "clusters.parquet")
    lines = [f"{name}\t{'what ' + name if name != 'all' else ''}\t" + "\t".join(genes) for name, genes in SETS.items()]
    (tmp_path / "sets.gmt").write_text("\n".join(line.replace("G09", "NINE") for line in lines) + "\n")
    (tmp_path / "aliases.tsv").write_text("a\tb\nG09\tNINE\n")
    sources = [FeatureSource(kind="gene_sets", path=str(tmp_path / "sets.gmt")), FeatureSource(kind="coexpression")]
    return tmp_path / "clusters.parquet", sources


def test_table_and_figure(tmp_path: Path) -> None:
    clusters, sources = write(tmp_path)
    write_enrichment(clusters=clusters, sources=sources, aliases=str(tmp_path / "aliases.tsv"), out=tmp_path / "e.parquet")
    table = contracts.ENRICHMENT.read(tmp_path / "e.parquet").astype({"kind": str, "set": str, "cluster": str})
    found = table.set_index(["kind", "cluster", "set"])
    assert found.loc[("perturbation", "0", "ten"), "overlap"] == 10
    assert found.loc[("perturbation", "0", "ten"), "universe"] == 30
    assert found.loc[("gene", "0", "ten"), "description"] == "what ten"
    assert "one" not in set(table["set"])
    write_enrichment(clusters=clusters, sources=sources, aliases=None, out=tmp_path / "bare.parquet")
    bare = contracts.ENRICHMENT.read(tmp_path / "bare.parquet").astype(str).set_index(["kind", "cluster", "set"])
    assert bare.loc[("perturbation", "0", "ten"), "overlap"] == "9"
    for path in (tmp_path / "e.parquet",):
        draw_enrichment(enrichment=path, png=tmp_path / "a.png", pdf=tmp_path / "a.pdf")
        image = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
        assert min(image[[0, -1]].min(), image[:, [0, -1]].min()) > 240
        assert (image < 200).mean() > 0.003
    contracts.ENRICHMENT.write(contracts.ENRICHMENT.read(tmp_path / "e.parquet").iloc[:0], tmp_path / "none.parquet")
    draw_enrichment(enrichment=tmp_path / "none.parquet", png=tmp_path / "b.png", pdf=tmp_path / "b.pdf")


def test_a_few_sets_of_each_cluster_are_shown() -> None:
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"cluster": rng.integers(12, size=300).astype(str), "set": [f"S{i}" for i in range(300)], "p": rng.random(300)})
    table["members"] = table["set"]
    part = shown(table)
    assert len(part) == MAX_ROWS
    assert part["cluster"].value_counts().max() <= PER_CLUSTER
    assert part["p"].min() == table["p"].min()
