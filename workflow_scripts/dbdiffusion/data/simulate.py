"""A simulated Perturb-seq screen with known truth.

Counts are negative binomial with gene-wise dispersion around mu_ij = L_i p_j exp(b_ij + sum_m a_im w_mj + d_ij):

- L_i: depth, log-normal, shifted by batch and by perturbation (depth confounding); p_j: share of the library, log-normal over genes;
- b: batch effect of the gene; w: programmes, each a set of target genes with signed weights; a_im ~ N(0, ACTIVITY_SD) a cell's
  programme activity. Regulators of a programme carry a weight of their own, so that they are co-expressed with its targets;
- d: effect of the cell's perturbation, 0 in control cells and in escapers. A regulator that is co-expressed positively activates its
  programme, so its loss lowers it; one with a negative weight represses it. Every perturbation with an effect adds sparse effects of its
  own; its own gene's log fold change is the knock-down.

Because activity has the same variance in all cells, d is exactly the log fold change of the mean count.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.interpolate import CubicSpline

from dbdiffusion.config.datasets import SimulateDataset
from dbdiffusion.data.log_means import expected_log_cp10k
from dbdiffusion.data.sets import CONTROL
from dbdiffusion.runtime.errors import UserError
from dbdiffusion.runtime.files import atomic_path
from dbdiffusion.runtime.provenance import versions
from dbdiffusion.runtime.seeds import rng
from dbdiffusion.runtime.tables import Column, Table

MITO = ("MT-ATP6", "MT-CO1", "MT-CO2", "MT-CYB", "MT-ND1")
KINDS = ("programme", "null", "outside", "unmeasured", "double")

# Shape of the counts, set beside THP-1 CITE-seq counts (Papalexi et al. 2021): see the methods page.
GENE_LOG_SD = 1.7
DEPTH_LOG_SD = 0.4
MEASURED_SHARE = 0.25
MITO_SHARE = 0.04
DYING_SHARE = 0.02
BATCH_DEPTH_SD = 0.15
BATCH_GENE_SD = 0.1
# Biology of the screen.
ACTIVITY_SD = 0.5
TARGET_SHARE = 0.08
REGULATOR_WEIGHT = 1.2
REPRESSOR_SHARE = 0.2
SECOND_PROGRAMME_SHARE = 0.2
OWN_GENES_SHARE = 0.1
KNOCK_DOWN = (0.15, 0.45)
INTERACTION_SD = 0.1
GRID = 33  # log fold changes at which expected log expression is worked out

TRUTH = Table(
    "truth",
    "What was simulated: the log fold change of every gene's mean count under every perturbation, and what it is in ln(1 + CP10k).",
    [
        Column("perturbation", "str", "", "perturbation"),
        Column("gene", "str", "", "gene symbol"),
        Column("lfc", "float", "natural log", "log fold change of the mean count in cells that did not escape"),
        Column("lfc_mixed", "float", "natural log", "the same over all cells of the perturbation, escapers included"),
        Column(
            "effect",
            "float",
            "ln(1 + CP10k)",
            "expected difference to control in mean ln(1 + CP10k) at the control's depth, escapers and the change of the total included",
        ),
        Column("programme", "str", "", "programmes it regulates, joined by `,`; else empty"),
        Column("kind", "str", "", "programme, null, outside (of every programme), unmeasured (its gene), double", choices=KINDS),
        Column("escapers", "float", "0-1", "expected share of escaping cells"),
    ],
    ("perturbation", "gene"),
)


@dataclass(frozen=True)
class _Genes:
    """names (G,); share of the library p (G,); dispersion phi (G,); mito (G,) bool."""

    names: np.ndarray
    share: np.ndarray
    dispersion: np.ndarray
    mito: np.ndarray


@dataclass(frozen=True)
class _Screen:
    """table: kind and programmes of each perturbation; weights: (programmes, G) of a cell's activity; lfc: (P, G) natural log;
    regulators, activators and target genes of each programme."""

    table: pd.DataFrame
    weights: np.ndarray
    lfc: np.ndarray
    regulators: list[list[str]]
    activators: list[list[str]]
    targets: list[list[str]]


def write_screen(config: SimulateDataset, *, counts: str | Path, annotations: str | Path, truth: str | Path) -> None:
    """Simulate a screen.

    counts: .h5ad in the layout of cells.h5ad (config.genes genes and five mitochondrial ones; total_counts over measured and unmeasured
    genes); annotations: gene sets (.gmt), for each programme sets with its regulators and some random ones; truth: table `truth` (parquet).

    Raises UserError when there are more perturbations than genes.
    """
    import anndata

    genes = _make_genes(config)
    screen = _make_screen(config, genes)
    matrix, obs = _make_cells(config, genes, screen)
    table = anndata.AnnData(matrix, obs=obs, var=pd.DataFrame({"mito": genes.mito}, index=genes.names))
    table.uns["provenance"] = {
        "source": "simulated",
        "config": config.model_dump_json(),
        **{f"version_{name}": version for name, version in versions("numpy", "scipy", "anndata").items()},
    }
    with atomic_path(counts) as temporary:
        table.write_h5ad(temporary, compression="gzip")
    with atomic_path(annotations) as temporary:
        temporary.write_text(_annotations(config, genes, screen))
    TRUTH.write(_truth(config, genes, screen), truth)


def _make_genes(config: SimulateDataset) -> _Genes:
    """Genes, a few of them highly and most lowly expressed, with more dispersion in low ones; mitochondrial genes last."""
    random = rng(config.seed, "genes")
    share = np.exp(random.normal(0, GENE_LOG_SD, config.genes))
    # A gene with a large part of all counts would make every other gene's share depend on it.
    share = np.minimum(share, 40 * np.median(share))
    mito = np.exp(random.normal(0, 0.5, len(MITO)))
    share = np.concatenate([MEASURED_SHARE * share / share.sum(), MITO_SHARE * mito / mito.sum()])
    mean = config.library_size * share
    dispersion = (0.1 + 0.1 / np.sqrt(mean)) * np.exp(random.normal(0, 0.4, len(share)))
    names = np.array([f"GENE{number:04d}" for number in range(1, config.genes + 1)] + list(MITO), dtype=object)
    return _Genes(names, share, dispersion, np.arange(len(share)) >= config.genes)


def _make_screen(config: SimulateDataset, genes: _Genes) -> _Screen:
    """Which genes are perturbed, the programmes they regulate, and every perturbation's log fold changes."""
    table = _pick_perturbations(config, genes)
    column = {name: at for at, name in enumerate(genes.names) if name in table.index}
    (outside,) = table.index[table["kind"] == "outside"]
    weights, targets = _programmes(config, genes, column[outside])
    regulation = _regulation(config, table["kind"])
    table["programme"] = [",".join(_programme_name(m) for m in np.flatnonzero(row)) for row in regulation]
    lfc = -regulation @ weights + _own_effects(config, genes, table["kind"])
    for row, (name, kind) in enumerate(table["kind"].items()):
        if name in column and kind != "null":
            lfc[row, column[name]] = np.log(rng(config.seed, "knock-down", name).uniform(*KNOCK_DOWN))
            weights[:, column[name]] = REGULATOR_WEIGHT * regulation[row]
    regulators = [list(table.index[row != 0]) for row in regulation.T]
    activators = [list(table.index[row > 0]) for row in regulation.T]
    table, lfc = _add_doubles(config, table, lfc, column)
    return _Screen(table, weights, lfc, regulators, activators, targets)


def _regulation(config: SimulateDataset, kinds: pd.Series) -> np.ndarray:
    """(P, programmes) how strongly a gene activates (> 0) or represses (< 0) a programme; its loss does the opposite.

    Programmes take turns, so that each has regulators; some regulators have a weaker second programme.
    """
    random = rng(config.seed, "regulation")
    regulation = np.zeros((len(kinds), config.programmes))
    for turn, row in enumerate(np.flatnonzero(kinds.isin(["programme", "unmeasured"]))):
        first = turn % config.programmes
        # The unmeasured gene activates one programme, so that its annotations are enough to predict it.
        plain = kinds.iloc[row] == "unmeasured"
        sign = -1.0 if random.random() < REPRESSOR_SHARE and not plain else 1.0
        regulation[row, first] = sign * random.uniform(0.6, 1.4)
        second = (first + random.integers(1, max(2, config.programmes))) % config.programmes
        if random.random() < SECOND_PROGRAMME_SHARE and second != first and not plain:
            regulation[row, second] = 0.4 * sign * random.uniform(0.6, 1.4)
    return regulation


def _own_effects(config: SimulateDataset, genes: _Genes, kinds: pd.Series) -> np.ndarray:
    """(P, G) what a perturbation shares with no other: sparse effects, and the whole profile of the outside one."""
    effects = np.zeros((len(kinds), len(genes.names)))
    for row, (name, kind) in enumerate(kinds.items()):
        random = rng(config.seed, "own effects", name)
        if kind == "null":
            continue
        if kind == "outside":
            chosen = random.choice(config.genes, _target_number(config), replace=False)
            effects[row, chosen] = random.normal(0, config.effect_sd, len(chosen))
        own = (random.random(len(genes.names)) < OWN_GENES_SHARE) & ~genes.mito
        effects[row, own] += random.normal(0, config.own_effect_sd, own.sum())
    return effects


def _programme_name(number: int) -> str:
    return f"PROGRAMME{number + 1:02d}"


def _target_number(config: SimulateDataset) -> int:
    return max(8, round(TARGET_SHARE * config.genes))


def _pick_perturbations(config: SimulateDataset, genes: _Genes) -> pd.DataFrame:
    """Single perturbations with their kind: expressed genes, and one gene that is not measured."""
    if config.perturbations > config.genes:
        raise UserError(
            f"{config.perturbations} perturbations of {config.genes} genes",
            where="config key datasets.<name>.perturbations",
            fix=f"choose at most {config.genes} perturbations, or simulate more genes",
        )
    random = rng(config.seed, "perturbations")
    # Guides are designed against expressed genes; the lowest ones would show neither knock-down nor co-expression.
    order = np.argsort(-genes.share[: config.genes], kind="stable")
    candidates = order[: max(config.perturbations, round(0.6 * config.genes))]
    measured = genes.names[np.sort(random.choice(candidates, config.perturbations - 1, replace=False))]
    names = [*measured, f"GENE{config.genes + 1:04d}"]
    nulls = min(round(config.null_share * config.perturbations), config.perturbations - 4)
    kinds = np.array(["null"] * nulls + ["outside"] + ["programme"] * (config.perturbations - nulls - 2), dtype=object)
    return pd.DataFrame({"kind": [*random.permutation(kinds), "unmeasured"]}, index=names)


def _programmes(config: SimulateDataset, genes: _Genes, outside: int) -> tuple[np.ndarray, list[list[str]]]:
    """Weights (programmes, G) of the target genes in natural log per unit of activity, and the targets' names.

    The gene `outside` every programme is no target either, or co-expression would place it in one.
    """
    random = rng(config.seed, "programmes")
    weights, targets = np.zeros((config.programmes, len(genes.names))), []
    for programme in range(config.programmes):
        chosen = np.sort(random.choice(np.delete(np.arange(config.genes), outside), _target_number(config), replace=False))
        weights[programme, chosen] = random.normal(0, config.effect_sd, len(chosen))
        targets.append(list(genes.names[chosen]))
    return weights, targets


def _add_doubles(config: SimulateDataset, table: pd.DataFrame, lfc: np.ndarray, column: dict[str, int]) -> tuple[pd.DataFrame, np.ndarray]:
    """Doubles A+B of perturbations with an effect: the sum of both and a small interaction on the genes they touch."""
    random = rng(config.seed, "doubles")
    names = [name for name in table.index[table["kind"] == "programme"] if name in column]
    pairs = [(a, b) for at, a in enumerate(names) for b in names[at + 1 :]]
    chosen = [pairs[at] for at in np.sort(random.permutation(len(pairs))[: config.doubles])]
    rows, records = [], []
    for pair in chosen:
        a, b = (lfc[table.index.get_loc(name)] for name in pair)
        rows.append(a + b + random.normal(0, INTERACTION_SD, len(a)) * ((a != 0) & (b != 0)))
        programmes = {label for name in pair for label in table.at[name, "programme"].split(",")}
        records.append({"kind": "double", "programme": ",".join(sorted(programmes))})
    doubles = pd.DataFrame(records, index=["+".join(sorted(pair)) for pair in chosen], columns=["kind", "programme"])
    return pd.concat([table, doubles]), np.vstack([lfc, *rows])


def _guides(config: SimulateDataset, name: str) -> tuple[list[str], np.ndarray]:
    """Guides of a perturbation and the share of each guide's cells that escape."""
    if name == CONTROL:
        guides = [f"NT{number:02d}" for number in range(1, config.control_guides + 1)]
        return guides, np.zeros(len(guides))
    genes = name.split("+")
    guides = ["+".join(f"{gene}g{number}" for gene in genes) for number in (1, 2)]
    e = config.escaper_share
    return guides, rng(config.seed, "escapers", name).beta(10 * e, 10 * (1 - e), 2) if e > 0 else np.zeros(2)


def _make_cells(config: SimulateDataset, genes: _Genes, screen: _Screen) -> tuple[sparse.csr_matrix, pd.DataFrame]:
    """Cells of all perturbations and the control, in random order: counts (cells, G) and obs."""
    random = rng(config.seed, "batches")
    batch_depth = random.normal(0, BATCH_DEPTH_SD, config.batches)
    batch_gene = random.normal(0, BATCH_GENE_SD, (config.batches, len(genes.names)))
    effects = {CONTROL: np.zeros(len(genes.names)), **dict(zip(screen.table.index, screen.lfc, strict=True))}
    matrices, tables = [], []
    for name, effect in effects.items():
        random = rng(config.seed, "cells", name)
        obs, escaped, shift = _cell_table(config, name, random)
        batch = obs["batch"].to_numpy(dtype=int)
        depth = np.exp(np.log(config.library_size) + batch_depth[batch] + shift + random.normal(0, DEPTH_LOG_SD, len(obs)))
        activity = random.normal(0, ACTIVITY_SD, (len(obs), config.programmes))
        mito = random.normal(0, 0.3, len(obs)) + np.log(10) * (random.random(len(obs)) < DYING_SHARE)
        log_ratio = batch_gene[batch] + activity @ screen.weights + np.outer(~escaped, effect) + np.outer(mito, genes.mito)
        mean = depth[:, None] * genes.share * np.exp(log_ratio)
        counts = random.poisson(mean * random.gamma(1 / genes.dispersion, genes.dispersion, mean.shape))
        unmeasured = random.poisson(depth * (1 - MEASURED_SHARE - MITO_SHARE))
        obs["total_counts"] = (counts.sum(axis=1) + unmeasured).astype(float)
        matrices.append(sparse.csr_matrix(counts.astype(np.float32)))
        tables.append(obs)
    matrix, obs = sparse.vstack(matrices, format="csr"), pd.concat(tables, ignore_index=True)
    order = rng(config.seed, "order").permutation(len(obs))
    obs = obs.iloc[order]
    obs.index = [f"CELL{number:06d}" for number in range(1, len(obs) + 1)]
    return matrix[order], obs


def _cell_table(config: SimulateDataset, name: str, random: np.random.Generator) -> tuple[pd.DataFrame, np.ndarray, float]:
    """Guide and batch of a perturbation's cells, which of them escape (cells,), and the perturbation's shift of log depth."""
    guides, escape = _guides(config, name)
    if name == CONTROL:
        guide = np.repeat(np.arange(len(guides)), config.cells_per_control_guide)
        shift, composition = 0.0, np.full(config.batches, 1 / config.batches)
    else:
        number = max(5, round(config.cells_per_perturbation * np.exp(random.normal(0, 0.25))))
        guide = random.integers(len(guides), size=number)
        shift = random.normal(0, config.depth_confounding)
        composition = random.dirichlet(np.full(config.batches, 20.0))
    batch = random.choice(config.batches, size=len(guide), p=composition)
    escaped = random.random(len(guide)) < escape[guide]
    columns = {"perturbation": name, "guide": np.array(guides, dtype=object)[guide], "batch": batch.astype(str).astype(object)}
    return pd.DataFrame(columns), escaped, shift


def _annotations(config: SimulateDataset, genes: _Genes, screen: _Screen) -> str:
    """Gene sets in .gmt lines: per programme its regulators, and its activators with some of its targets; as many random sets.

    Each member is replaced by a random gene with probability annotation_noise; the unmeasured gene, known by these sets alone, stays.
    """
    random = rng(config.seed, "annotations")
    pool = genes.names[~genes.mito]
    (unmeasured,) = screen.table.index[screen.table["kind"] == "unmeasured"]
    singles = list(screen.table.index[screen.table["kind"] != "double"])
    lines = []

    def add(name: str, members: list[str]) -> None:
        kept = [m if m == unmeasured or random.random() >= config.annotation_noise else str(random.choice(pool)) for m in members]
        lines.append("\t".join([name, "simulated", *sorted(set(kept))]))

    for programme, members in enumerate(screen.regulators):
        if members:
            add(f"{_programme_name(programme)}_REGULATORS", members)
            others = random.choice(screen.targets[programme], 5, replace=False)
            add(f"{_programme_name(programme)}_COMPLEX", [*screen.activators[programme], *others])
    for number in range(2 * config.programmes):
        mixed = [*random.choice(singles, min(4, len(singles)), replace=False), *random.choice(pool, 4, replace=False)]
        lines.append("\t".join([f"RANDOM{number + 1:02d}", "simulated", *sorted({str(m) for m in mixed} - {unmeasured})]))
    return "\n".join(lines) + "\n"


def _truth(config: SimulateDataset, genes: _Genes, screen: _Screen) -> pd.DataFrame:
    """Rows of table `truth`."""
    names, n_genes = screen.table.index.to_numpy(dtype=object), len(genes.names)
    escapers = np.array([_guides(config, name)[1].mean() for name in names])
    mixed = np.log((1 - escapers)[:, None] * np.exp(screen.lfc) + escapers[:, None])
    return pd.DataFrame(
        {
            "perturbation": np.repeat(names, n_genes),
            "gene": np.tile(genes.names, len(names)),
            "lfc": screen.lfc.ravel(),
            "lfc_mixed": mixed.ravel(),
            "effect": ((1 - escapers)[:, None] * _log_scale_effects(config, genes, screen)).ravel(),
            "programme": np.repeat(screen.table["programme"].to_numpy(dtype=object), n_genes),
            "kind": np.repeat(screen.table["kind"].to_numpy(dtype=object), n_genes),
            "escapers": np.repeat(escapers, n_genes),
        }
    )


def _log_scale_effects(config: SimulateDataset, genes: _Genes, screen: _Screen) -> np.ndarray:
    """(P, G) differences in expected ln(1 + CP10k) of cells that did not escape, at the control's depth and over all batches.

    Genes that change move the total by which all counts are scaled: other genes change a little the other way. Interpolated over
    a grid of log fold changes, and linearly in the log of the total, so that the cost does not grow with the number of perturbations.
    """
    gene_sd = np.sqrt(ACTIVITY_SD**2 * (screen.weights**2).sum(axis=0) + BATCH_GENE_SD**2)
    mean_share = genes.share * np.exp(gene_sd**2 / 2)
    base = mean_share.sum() + 1 - MEASURED_SHARE - MITO_SHARE
    total = np.log1p((np.exp(screen.lfc) - 1) @ mean_share / base)
    grid = np.linspace(min(screen.lfc.min(), -0.1), max(screen.lfc.max(), 0.1), GRID)
    shares = genes.share * np.exp(np.append(grid, 0.0))[:, None]
    library, depth_sd = config.library_size, float(np.hypot(DEPTH_LOG_SD, BATCH_DEPTH_SD))
    same, larger = (
        expected_log_cp10k(shares, genes.dispersion, gene_sd, library=library, depth_sd=depth_sd, total=base * t) for t in (1.0, 1.1)
    )
    change, slope = same[:-1] - same[-1], (larger - same)[:-1] / np.log(1.1)
    columns = [
        CubicSpline(grid, one)(lfc) + total * CubicSpline(grid, two)(lfc)
        for one, two, lfc in zip(change.T, slope.T, screen.lfc.T, strict=True)
    ]
    return np.column_stack(columns)
