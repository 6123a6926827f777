"""How well perturbations are located: error against the training mean, true neighbours among the weights, and whether confidence is earned.

Every query is measured, so that its true place is known, but is located as an unmeasured one: pseudo-targets by features that their
cross-fit fold's cells had no part in, held-out targets by those of the whole fold. Nothing here is used for a prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from dbdiffusion.config.embedding import ClustersConfig, EmbeddingConfig, LocationConfig
from dbdiffusion.config.splits import ALL
from dbdiffusion.data.moments import Moments
from dbdiffusion.data.sets import EffectSet, LocationSet
from dbdiffusion.data.splits import Splits, parts
from dbdiffusion.perturbations.abstention import coverage, threshold
from dbdiffusion.perturbations.clusters import perturbation_clusters
from dbdiffusion.perturbations.effects import estimate_effects, gene_scale
from dbdiffusion.perturbations.embedding import embed
from dbdiffusion.perturbations.features import GeneFeatures, of_fit, permute_features
from dbdiffusion.perturbations.locators import Clustering, ClusterLocator, Known, Locator, candidates
from dbdiffusion.runtime import contracts
from dbdiffusion.runtime.seeds import derive_seed, rng

IN_USE, COMBINATIONS = "in use", "in use, combinations"
PERMUTATIONS = 10
MAX_QUERIES = 300  # of a group, on which locators are compared: seeded samples of larger ones
EDGES = np.linspace(0, 1, 6)
"""Bins of confidence: [0, 0.2), ..., [0.8, 1]."""


@dataclass(frozen=True)
class Group:
    """Queries that are located with the same features.

    role: target or pseudo; queries: (Q,); measured: (P,) possible neighbours; truth: (Q, G) and values: (P, G) their scaled effects;
    baseline: (Q,) squared distance to the mean of the neighbours that are free; free: (Q, P) whether a neighbour is one: neither the
    query nor a combination with it; same: (Q, P) whether it is also in the query's true cluster.
    """

    role: str
    queries: list[str]
    measured: list[str]
    truth: np.ndarray
    values: np.ndarray
    baseline: np.ndarray
    same: np.ndarray
    free: np.ndarray

    @classmethod
    def make(
        cls, role: str, queries: Sequence[str], truth: np.ndarray, measured: Sequence[str], values: np.ndarray, cluster: dict[str, str]
    ) -> Group:
        """cluster: of queries and neighbours, by name (none for combinations)."""
        genes = [set(parts(name)) for name in measured]
        free = np.array([[not own.issuperset(parts(query)) for own in genes] for query in queries], dtype=bool)
        same = np.array([[cluster.get(query, "") == cluster.get(name) for name in measured] for query in queries], dtype=bool)
        shape = (len(queries), len(measured))
        free, same = free.reshape(shape), same.reshape(shape)
        uniform = free / np.maximum(free.sum(axis=1, keepdims=True), 1)
        made = cls(role, list(queries), list(measured), truth, values, np.zeros(len(queries)), same & free, free)
        return replace(made, baseline=made.distance(uniform))

    def distance(self, weights: np.ndarray) -> np.ndarray:
        """(Q,) squared distance of the neighbours' weighted mean effect to the measured one."""
        return ((self.truth - weights @ self.values) ** 2).sum(axis=1)

    def judge(self, weights: np.ndarray, located: np.ndarray) -> np.ndarray:
        """(Q, 3) located, error, purity. The training mean stands in for a query without a location, which has no purity."""
        error = np.where(located, self.distance(weights), self.baseline)
        positive = np.maximum(weights, 0.0) * self.free
        total = positive.sum(axis=1)
        there = located & (total > 0)
        purity = np.divide((positive * self.same).sum(axis=1), total, out=np.full(len(total), np.nan), where=there)
        return np.column_stack([located.astype(float), error, purity])

    def rows(
        self,
        locator: str,
        features: str,
        judged: np.ndarray,
        confidence: np.ndarray | None = None,
        covered: np.ndarray | None = None,
    ) -> pd.DataFrame:
        """Rows of contract `location_quality`, but for seed and fold."""
        chance = self.same.sum(axis=1) / np.maximum(self.free.sum(axis=1), 1)
        frame = pd.DataFrame({"role": self.role, "query": self.queries, "locator": locator, "features": features})
        frame["located"], frame["error"], frame["purity"] = judged.T
        frame["baseline"] = self.baseline
        frame["purity_random"] = np.where(np.isnan(judged[:, 2]), np.nan, chance)
        frame["confidence"] = np.full(len(frame), np.nan) if confidence is None else confidence
        frame["coverage"] = np.full(len(frame), np.nan) if covered is None else covered
        return frame


def true_clusters(training: EffectSet, held_out: EffectSet | None, config: ClustersConfig, seed: int) -> dict[str, str]:
    """Clusters of all measured single perturbations by their own effects, held-out ones included: the truth to compare with."""
    names = [name for name in training.perturbations if len(parts(name)) == 1]
    joined = training.subset(names)
    if held_out is not None:
        values = {
            key: np.concatenate([getattr(joined, key), getattr(held_out, key)]) for key in ("mean", "effect", "se", "variance", "n_cells")
        }
        joined = replace(joined, perturbations=pd.Index([*names, *held_out.perturbations]), **values)
    labels = perturbation_clusters(embed(joined, EmbeddingConfig()).scores, config, seed)
    return dict(zip(joined.perturbations, labels, strict=True))


def write_location_quality(
    *,
    moments: str | Path,
    splits: str | Path,
    effects: str | Path,
    locations: str | Path,
    clusters: str | Path,
    gene_features: str | Path,
    fold: str,
    seed: int,
    location: LocationConfig,
    config: ClustersConfig,
    out: str | Path,
) -> None:
    """Write contract `location_quality` of one fold.

    moments: read for the held-out targets' truth; locations, clusters, gene_features: as stage `locate` wrote them; location, config: the
    settings that locators are tried with, and those of the true clusters.
    """
    training, split = EffectSet.read(effects), Splits.read(splits)
    measured = set(split.measured)
    targets = [name for name in split.targets(fold) if name in measured]
    held_out = estimate_effects(Moments.read(moments), targets, training.genes) if targets else None
    one = [name for name in targets if len(parts(name)) == 1]
    cluster = true_clusters(training, held_out.subset(one) if held_out is not None and one else None, config, seed)
    unit = gene_scale(training.se)
    truth = {
        name: effect / unit for each in (training, held_out) if each for name, effect in zip(each.perturbations, each.effect, strict=True)
    }
    used = LocationSet.read(locations, ALL, training.perturbations)
    frames = in_use(used, truth, targets, split, fold, training, cluster, location.coverage, seed)
    singles = [name for name in training.perturbations if len(parts(name)) == 1]
    table = contracts.GENE_FEATURES.read(gene_features)
    trials = []
    for role, fit, everyone in _groups(split, fold, one, set(singles)):
        if everyone:
            order = rng(seed, "location quality", "queries", fold, role, fit).permutation(len(everyone))[:MAX_QUERIES]
            queries = [everyone[i] for i in np.sort(order)]
            values = np.array([truth[name] for name in singles])
            group = Group.make(role, queries, np.array([truth[name] for name in queries]), singles, values, cluster)
            trials.append((group, list(of_fit(table, fit).values())))
    frames += compare(trials, location, _clustering(clusters), seed)
    columns = [name for name in contracts.LOCATION_QUALITY.names if name not in ("seed", "fold")]
    whole = pd.concat([frame for frame in frames if len(frame)] or [pd.DataFrame(columns=columns)], ignore_index=True)
    contracts.LOCATION_QUALITY.write(whole.assign(seed=seed, fold=fold), out)


def _groups(split: Splits, fold: str, targets: list[str], singles: set[str]) -> list[tuple[str, str, list[str]]]:
    """(role, fit of the features, single queries)."""
    pseudo = [("pseudo", q, [name for name in split.inner(fold, q) if name in singles]) for q in split.crossfit_names(fold)]
    return [*pseudo, ("target", ALL, targets)]


def _clustering(path: str | Path) -> Clustering:
    frame = contracts.CLUSTERS.read(path).astype({"kind": str, "name": str, "cluster": str})
    sides = {kind: dict(zip(rows["name"], rows["cluster"], strict=True)) for kind, rows in frame.groupby("kind")}
    return Clustering(sides.get("perturbation", {}), sides.get("gene", {}))


def in_use(
    locations: LocationSet,
    truth: dict[str, np.ndarray],
    targets: list[str],
    split: Splits,
    fold: str,
    training: EffectSet,
    cluster: dict[str, str],
    level: float,
    seed: int,
) -> list[pd.DataFrame]:
    """The locations that predictions use, singles and combinations apart; permuted: other neighbours with the same weights.

    Weights on the control drop out, its effect being zero. level: of the intervals whose coverage is measured, of singles.
    """
    names = list(training.perturbations)
    values = np.array([truth[name] for name in names])
    inner = {name for q in split.crossfit_names(fold) for name in split.inner(fold, q)}
    frames = []
    for role, known in (("pseudo", inner), ("target", set(targets))):
        for label in (IN_USE, COMBINATIONS):
            queries = [q for q in locations.queries if q in known and q in truth and (len(parts(q)) == 1) == (label == IN_USE)]
            if not queries:
                continue
            used = [i for i, name in enumerate(names) if label == COMBINATIONS or len(parts(name)) == 1]
            neighbours = [names[i] for i in used]
            group = Group.make(role, queries, np.array([truth[q] for q in queries]), neighbours, values[used], cluster)
            chosen = locations.select(queries)
            weights, there = chosen.weights[:, used], (chosen.info["status"] == "located").to_numpy()
            found = [group.judge(_shuffled(weights, group.free, seed, number), there) for number in range(PERMUTATIONS)]
            confidence = chosen.info["confidence"].to_numpy(dtype=float)
            covered = coverage(weights, values[used], group.truth, level) if label == IN_USE else None
            for kind, judged in (("given", group.judge(weights, there)), ("permuted", np.mean(found, axis=0))):
                if label == COMBINATIONS:
                    judged[:, 2] = np.nan
                frames.append(group.rows(label, kind, judged, *((confidence, covered) if kind == "given" else (None, None))))
    return frames


def _shuffled(weights: np.ndarray, free: np.ndarray, seed: int, number: int) -> np.ndarray:
    """Weights given to other neighbours, one permutation for all queries; what falls on the query itself goes to the others."""
    order = rng(seed, "location quality", "in use", number).permutation(weights.shape[1])
    out = np.where(free, weights[:, order], 0.0)
    left, total = out.sum(axis=1, keepdims=True), weights.sum(axis=1, keepdims=True)
    return out * np.divide(total, left, out=np.ones_like(left), where=np.abs(left) > 1e-9)


def families(location: LocationConfig, sources: Sequence[str]) -> dict[str, list[Locator]]:
    """Name of a locator with its sources -> its settings, the most cautious first. The cluster rule has none to choose."""
    out: dict[str, list[Locator]] = {}
    for locator in candidates(location.model_copy(update={"locator": "auto"}), sources):
        kind, used = locator.label.split("(")[0], getattr(locator, "sources", ())
        name = f"{kind}: {'all sources' if len(used) > 1 else used[0]}" if used else f"{kind} rule"
        out.setdefault(name, []).append(locator)
    return out


def compare(
    trials: Sequence[tuple[Group, list[GeneFeatures]]], location: LocationConfig, clustering: Clustering, seed: int
) -> list[pd.DataFrame]:
    """Rows of every locator and source on groups of single queries with their features, given and permuted over genes.

    A locator's setting (temperature, penalty) has the smallest error on the pseudo-targets of the other groups. The cluster rule is tried
    on targets alone, its clusters having been learned with the pseudo-targets' cells.
    """
    if not trials:
        return []
    sources = sorted({source.source for _, features in trials for source in features})
    found: dict[str, list[list[np.ndarray]]] = {"given": [_judge_all(trials, location, sources, clustering)], "permuted": []}
    for number in range(PERMUTATIONS):
        at = derive_seed(seed, "location quality", number)
        permuted = [(group, permute_features(features, at)) for group, features in trials]
        found["permuted"].append(_judge_all(permuted, location, sources, None))
    frames = []
    for kind, runs in found.items():
        for name in runs[0]:
            for number, (group, _) in enumerate(trials):
                if runs[0][name][number] is not None:
                    judged = np.array([run[name][number] for run in runs])
                    frames.append(group.rows(name, kind, _mean(judged)))
    return frames


def _mean(judged: np.ndarray) -> np.ndarray:
    """(Q, 3) mean over runs (R, Q, 3), of the purity over runs that located the query."""
    there = ~np.isnan(judged)
    return np.divide(
        np.where(there, judged, 0.0).sum(axis=0), there.sum(axis=0), out=np.full(judged.shape[1:], np.nan), where=there.any(axis=0)
    )


def _judge_all(
    trials: Sequence[tuple[Group, list[GeneFeatures]]], location: LocationConfig, sources: Sequence[str], clustering: Clustering | None
) -> dict[str, list[np.ndarray | None]]:
    """Family of locators -> judgement of each group (`Group.judge`), or None where it is not tried."""
    out: dict[str, list[np.ndarray | None]] = {}
    for name, settings in families(location, sources).items():
        if isinstance(settings[0], ClusterLocator):
            if clustering is not None:
                out[name] = [_judge(settings[0], *trial, clustering) if trial[0].role == "target" else None for trial in trials]
            continue
        judged = [[_judge(setting, *trial, None) for setting in settings] for trial in trials]
        out[name] = []
        for number in range(len(trials)):
            others = [one for other, one in enumerate(judged) if other != number and trials[other][0].role == "pseudo"]
            errors = np.array([[run[:, 1].sum() for run in one] for one in others]).sum(axis=0) if others else np.zeros(len(settings))
            out[name].append(judged[number][int(np.argmin(errors))])
    return out


def _judge(locator: Locator, group: Group, features: list[GeneFeatures], clustering: Clustering | None) -> np.ndarray:
    known = Known(group.measured, group.measured, {source.source: source for source in features}, lambda: clustering)
    located = locator.locate(group.queries, known)
    return group.judge(located.weights, located.reasons == "")


# --- summaries ---------------------------------------------------------------------------------------------------------


def summarise(table: pd.DataFrame, *, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """One row for each role, locator and features, with 95 % percentile intervals from a bootstrap over queries.

    Columns: role, locator, features, n (queries), located (share), error (sum of squared distances divided by the training mean's),
    error_low, error_high, purity, purity_low, purity_high, purity_random (means over queries with a location).
    A query under several seeds counts once, with its mean.
    """
    group, values = ["role", "locator", "features"], ["located", "error", "baseline", "purity", "purity_random"]
    text = dict.fromkeys((*group, "query"), str)
    rows = []
    for key, part in table.astype(text).groupby(group, sort=True):
        each = part.groupby("query", sort=True)[values].mean()
        n = len(each)
        draws = rng(seed, "location quality", "bootstrap", n).integers(n, size=(resamples, n))
        error, baseline, purity = (each[name].to_numpy() for name in ("error", "baseline", "purity"))
        ratio = error[draws].sum(axis=1) / np.maximum(baseline[draws].sum(axis=1), 1e-300)
        there = ~np.isnan(purity)
        hits, size = np.where(there, purity, 0.0)[draws].sum(axis=1), there[draws].sum(axis=1)
        pure = hits[size > 0] / size[size > 0]
        low, high = np.quantile(pure, [0.025, 0.975]) if len(pure) else (np.nan, np.nan)
        rows.append(
            {
                **dict(zip(group, key, strict=True)),
                "n": n,
                "located": each["located"].mean(),
                "error": error.sum() / max(baseline.sum(), 1e-300),
                "error_low": np.quantile(ratio, 0.025),
                "error_high": np.quantile(ratio, 0.975),
                "purity": each["purity"].mean(),
                "purity_low": low,
                "purity_high": high,
                "purity_random": each["purity_random"].mean(),
            }
        )
    columns = ["n", "located", "error", "error_low", "error_high", "purity", "purity_low", "purity_high", "purity_random"]
    return pd.DataFrame(rows, columns=[*group, *columns])


def reliability(table: pd.DataFrame, edges: np.ndarray = EDGES) -> pd.DataFrame:
    """Confidence of located queries against the share of them that were located better than by the training mean, and against their
    squared error relative to the training mean's, in bins.

    Bins are half-open, [a, b), but for the last, which holds its upper edge. Columns: group (pseudo and target, of single perturbations;
    combinations, of both roles), confidence (mean), share, low, high (95 % Clopper-Pearson), error (sum over the bin, divided by the
    training mean's), n. Empty bins are left out.
    """
    used = table[table["locator"].astype(str).isin([IN_USE, COMBINATIONS]) & (table["features"] == "given") & (table["located"] == 1)]
    better = used["error"] < used["baseline"] * (1 - 1e-9)
    bins = np.clip(np.searchsorted(edges, used["confidence"], side="right") - 1, 0, len(edges) - 2)
    group = np.where(used["locator"].astype(str) == COMBINATIONS, "combinations", used["role"].astype(str))
    frame = pd.DataFrame(
        {"group": group, "bin": bins, "better": better, **{name: used[name] for name in ("confidence", "error", "baseline")}}
    )
    rows = []
    for (name, _), part in frame.groupby(["group", "bin"], sort=True):
        n, hits = len(part), int(part["better"].sum())
        low = stats.beta.ppf(0.025, hits, n - hits + 1) if hits else 0.0
        high = stats.beta.ppf(0.975, hits + 1, n - hits) if hits < n else 1.0
        error = part["error"].sum() / max(part["baseline"].sum(), 1e-300)
        rows.append(
            {"group": name, "confidence": part["confidence"].mean(), "share": hits / n, "low": low, "high": high, "error": error, "n": n}
        )
    return pd.DataFrame(rows, columns=["group", "confidence", "share", "low", "high", "error", "n"])


def coverage_above(table: pd.DataFrame, level: float) -> tuple[pd.DataFrame, float]:
    """Coverage of the located single queries that are at least as confident as a threshold, for every threshold there is; and the
    smallest threshold with nominal coverage of the pseudo-targets (`perturbations.abstention`), over all folds and seeds.

    Columns: role, confidence (the threshold), coverage (mean over queries), low, high (95 %, normal), share (of the located), n.
    """
    used = table[(table["locator"].astype(str) == IN_USE) & (table["features"].astype(str) == "given") & table["coverage"].notna()]
    rows = []
    for role, part in used.groupby(used["role"].astype(str), sort=True):
        confidence, covered = part["confidence"].to_numpy(dtype=float), part["coverage"].to_numpy(dtype=float)
        for least in np.unique(confidence):
            above = covered[confidence >= least]
            half = 1.96 * above.std(ddof=1) / np.sqrt(len(above)) if len(above) > 1 else np.nan
            mean, n = above.mean(), len(above)
            rows.append(
                {
                    "role": role,
                    "confidence": least,
                    "coverage": mean,
                    "low": mean - half,
                    "high": mean + half,
                    "share": n / len(part),
                    "n": n,
                }
            )
    pseudo = used[used["role"].astype(str) == "pseudo"]
    found = threshold(pseudo["confidence"], pseudo["coverage"], level) if len(pseudo) else np.nan
    return pd.DataFrame(rows, columns=["role", "confidence", "coverage", "low", "high", "share", "n"]), found
