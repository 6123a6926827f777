"""Locations of a fold: where targets and pseudo-targets stand among the measured perturbations, each without its own cells."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from dbdiffusion.config.datasets import FeatureSource
from dbdiffusion.config.embedding import ClustersConfig, EmbeddingConfig, LocationConfig
from dbdiffusion.data.sets import CONTROL, EffectSet, LocationSet
from dbdiffusion.data.splits import Splits, parts, without
from dbdiffusion.perturbations.clusters import clusters_frame, gene_clusters, perturbation_clusters
from dbdiffusion.perturbations.combine import Additivity, locate_all
from dbdiffusion.perturbations.embedding import Embedding, embed, scaled_effects, training_of
from dbdiffusion.perturbations.features import COEXPRESSION, CellSums, GeneFeatures, cell_sums, coexpression, load_features, nonzero
from dbdiffusion.perturbations.locators import Clustering, Fold, Known, Locator, Ranked, candidates, rank
from dbdiffusion.runtime import contracts
from dbdiffusion.runtime.seeds import rng

logger = logging.getLogger(__name__)

ALL = "all"
CHOICE_FOLDS = 5  # folds of the choice among locators where there is no cross-fitting
LOADINGS = 64
MIXTURE = {"auto": "compare", "stack": "first"}  # part of the locators' stack in the choice


def singles(names: Sequence[str]) -> list[str]:
    """Perturbations of one gene."""
    return [name for name in names if len(parts(name)) == 1]


@dataclass(frozen=True)
class Plan:
    """Which perturbations' cells may be used where.

    training: of the fold; models: cross-fit model -> (perturbations it learns from, its pseudo-targets); blocks: the groups of
    singles by which locators are cross-fitted, each inside one model's pseudo-targets: (model, singles).
    """

    training: list[str]
    models: dict[str, tuple[list[str], list[str]]]
    blocks: list[tuple[str, list[str]]]

    @classmethod
    def make(cls, effects: EffectSet, splits: Splits, fold: str, seed: int) -> Plan:
        training = list(effects.perturbations)
        names = splits.crossfit_names(fold)
        kept = set(training)
        models = {q: (training_of(effects, splits, fold, q), [p for p in splits.inner(fold, q) if p in kept]) for q in names}
        # With few models their pseudo-targets are halved, so that the choice inside a model keeps most of its neighbours.
        groups, pieces = {q: singles(models[q][1]) for q in names}, 2 if len(names) < 4 else 1
        if names == [ALL]:
            groups, pieces = {ALL: singles(training)}, CHOICE_FOLDS
        blocks = []
        for q, group in groups.items():
            order = rng(seed, "location blocks", fold, q).permutation(len(group))
            blocks += [(q, sorted(group[i] for i in order[piece::pieces])) for piece in range(pieces)]
        return cls(training, models, [(q, block) for q, block in blocks if block])

    def choice(self, model: str | None) -> list[tuple[list[str], list[str]]]:
        """(learned from, queries) of the folds by which the locator is chosen: for the whole fold (none) or inside a model,
        whose pseudo-targets then play no part."""
        base = self.training if model is None else self.models[model][0]
        blocks = [block for q, block in self.blocks if model in (None, ALL) or q != model]
        folds = [(without(base, block), block) for block in blocks]
        return [(learned, queries) for learned, queries in folds if len(singles(learned)) >= 2]

    def learned_sets(self) -> list[tuple[str, ...]]:
        """Every set of perturbations that something is learned from."""
        sets = [self.training, *(learned for learned, _ in self.models.values())]
        for model in (None, *self.models):
            sets += [learned for learned, _ in self.choice(model)]
        return sorted({tuple(s) for s in sets})


@dataclass
class Learner:
    """What can be learned from a set of perturbations and the control: co-expression, embedding, clusters; each set once."""

    effects: EffectSet
    plan: Plan
    fixed: dict[str, GeneFeatures]
    coexpression_dimensions: int | None
    sums: dict[frozenset[str], CellSums | None]
    clusters: ClustersConfig
    seed: int
    _known: dict[tuple[str, ...], Known] = field(default_factory=dict)

    def loadings(self, learned: Sequence[str]) -> np.ndarray:
        """(G, d) co-expression loadings of the panel's genes in the cells of these perturbations and the control."""
        allowed = {*learned, CONTROL}
        found = [sums for group, sums in self.sums.items() if group <= allowed and sums is not None]
        total = found[0]
        for sums in found[1:]:
            total = total + sums
        return coexpression(total, max(self.clusters.gene_components, self.coexpression_dimensions or 0))

    def embedding(self, learned: Sequence[str]) -> Embedding:
        return embed(self.effects.subset(list(learned)), EmbeddingConfig(dimensions=LOADINGS))

    def known(self, learned: Sequence[str], measured: Sequence[str] | None = None) -> Known:
        """What is known when only the cells of `learned` may be used, with neighbours from `measured` (default: the same)."""
        key = tuple(learned)
        if key not in self._known:
            self._known[key] = self._learn(list(learned))
        known = self._known[key]
        return known if measured is None else Known(singles(measured), known.learned, known.features, known.cluster)

    def _learn(self, learned: list[str]) -> Known:
        genes = self.effects.genes
        features = dict(self.fixed)
        loadings = cache(lambda: self.loadings(learned))
        if self.coexpression_dimensions is not None:
            values = loadings()[:, : self.coexpression_dimensions]
            features = {COEXPRESSION: nonzero(GeneFeatures(COEXPRESSION, genes, values)), **features}

        def cluster() -> Clustering:
            labels = perturbation_clusters(self.embedding(learned).scores, self.clusters, self.seed)
            of_genes = gene_clusters(loadings(), self.clusters, self.seed)
            return Clustering(dict(zip(learned, labels, strict=True)), dict(zip(genes, of_genes, strict=True)))

        return Known(singles(learned), singles(learned), features, cache(cluster))


def write_locations(
    *,
    cells: str | Path,
    splits: str | Path,
    effects: str | Path,
    fold: str,
    features: list[FeatureSource],
    location: LocationConfig,
    clusters: ClustersConfig,
    seed: int,
    locations: str | Path,
    out_clusters: str | Path,
    gene_features: str | Path,
) -> None:
    """Locate a fold's targets and pseudo-targets; write contracts `locations`, `clusters` and `gene_features`.

    Fit `all` places targets over all training perturbations, and each pseudo-target over the others, with features, clusters
    and locator that its cross-fit fold's cells had no part in. Fit q places the pseudo-targets of model q and the targets
    over the perturbations the model learns from. No cell of a target is read; none of fold q enters fit q.
    """
    measured, split = EffectSet.read(effects), Splits.read(splits)
    plan = Plan.make(measured, split, fold, seed)
    targets = split.targets(fold)
    learner = make_learner(cells, measured, plan, targets, features, location, clusters, seed)
    locators = candidates(location, [source.name for source in features if source.name in known_sources(learner)])
    LocationSet.write(locate_fold(learner, locators, targets, MIXTURE.get(location.locator, "no")), locations)
    contracts.GENE_FEATURES.write(features_frame(learner, targets), gene_features)
    scores = learner.embedding(plan.training).scores
    frame = clusters_frame(measured.perturbations, scores, measured.genes, learner.loadings(plan.training), clusters, seed)
    contracts.CLUSTERS.write(frame, out_clusters)


def make_learner(
    cells: str | Path,
    effects: EffectSet,
    plan: Plan,
    targets: Sequence[str],
    features: Sequence[FeatureSource],
    location: LocationConfig,
    clusters: ClustersConfig,
    seed: int,
) -> Learner:
    """Read the feature files, and the training and control cells once, in groups that are always learned from together."""
    anchors = singles(plan.training)
    others = sorted({gene for name in [*plan.training, *targets] for gene in parts(name)} - set(anchors))
    fixed = {}
    for source in features:
        if source.kind != "coexpression" and (found := load_features(source, anchors, others)) is not None:
            fixed[source.name] = found
    own = [source.dimensions for source in features if source.kind == "coexpression"]
    groups = learning_groups(plan)
    sums = cell_sums(cells, [sorted(group) for group in groups], effects.genes, location.max_cells, seed)
    return Learner(effects, plan, fixed, own[0] if own else None, dict(zip(groups, sums, strict=True)), clusters, seed)


def learning_groups(plan: Plan) -> list[frozenset[str]]:
    """Training perturbations that belong to the same learned sets, one group each, and the control."""
    sets = [set(s) for s in plan.learned_sets()]
    groups: dict[tuple[bool, ...], list[str]] = {}
    for name in plan.training:
        groups.setdefault(tuple(name in s for s in sets), []).append(name)
    return [frozenset([CONTROL]), *(frozenset(group) for group in groups.values())]


def known_sources(learner: Learner) -> list[str]:
    """Feature sources that know some gene."""
    return [*([COEXPRESSION] if learner.coexpression_dimensions is not None else []), *learner.fixed]


def choose(learner: Learner, locators: Sequence[Locator], model: str | None, mixture: str) -> list[Ranked]:
    """Rank the locators for the whole fold (none), or for a model without its pseudo-targets' cells."""
    learned = learner.plan.training if model is None else learner.plan.models[model][0]
    values = dict(zip(learned, scaled_effects(learner.effects.subset(learned), "standard_error")[0], strict=True))
    folds = []
    for names, queries in learner.plan.choice(model):
        known = learner.known(names)
        truth, measured = (np.array([values[name] for name in group]) for group in (queries, known.measured))
        folds.append(Fold(queries, known, truth, measured))
    ranking = rank(locators, folds, mixture)
    for ranked in ranking[:3]:
        logger.info("locator for %s: %s, error %.3f of the training mean's", model or "the fold", ranked.locator.label, ranked.error)
    return ranking


def additivity(learner: Learner, learned: Sequence[str]) -> Additivity:
    """How often the sum of measured parts is the better guess for the measured combinations among these perturbations."""
    values = scaled_effects(learner.effects.subset(list(learned)), "standard_error")[0]
    return Additivity.measure(dict(zip(learned, values, strict=True)))


def locate_fold(learner: Learner, locators: Sequence[Locator], targets: Sequence[str], mixture: str = "compare") -> dict[str, LocationSet]:
    """Fit -> locations: "all", and one for each cross-fit model."""
    plan = learner.plan
    everyone = learner.effects.perturbations
    whole = plan.training
    ranking = choose(learner, locators, None, mixture)
    sums = additivity(learner, whole)
    pieces = [locate_all(targets, ["target"] * len(targets), learner.known(whole), ranking, singles(whole), sums, everyone)]
    fits: dict[str, LocationSet] = {}
    for q, (learned, pseudo) in plan.models.items():
        if q == ALL:
            continue
        ranking, sums = choose(learner, locators, q, mixture), additivity(learner, learned)
        queries, roles = [*pseudo, *targets], ["pseudo"] * len(pseudo) + ["target"] * len(targets)
        fits[q] = locate_all(queries, roles, learner.known(learned), ranking, singles(learned), sums, pd.Index(learned))
        # For debiasing, the other pseudo-targets of the fold may be neighbours, but they taught neither features nor choice.
        known = learner.known(learned, measured=whole)
        pieces.append(locate_all(pseudo, ["pseudo"] * len(pseudo), known, ranking, singles(learned), sums, everyone))
    return {ALL: _joined(pieces), **fits}


def _joined(pieces: Sequence[LocationSet]) -> LocationSet:
    pieces = [piece for piece in pieces if len(piece.queries)]
    queries = pd.Index([query for piece in pieces for query in piece.queries])
    weights = np.vstack([piece.weights for piece in pieces])
    return LocationSet(queries, pieces[0].neighbours, weights, pd.concat([piece.info for piece in pieces]))


def features_frame(learner: Learner, targets: Sequence[str]) -> pd.DataFrame:
    """Rows of contract `gene_features`: the genes of training perturbations and targets. Fit `all` has every source; fit q
    co-expression alone, since the other sources have seen no cell."""
    plan = learner.plan
    wanted = pd.Index(sorted({gene for name in [*plan.training, *targets] for gene in parts(name)}))
    fits = {ALL: list(learner.known(plan.training).features.values())}
    if learner.coexpression_dimensions is not None:
        fits |= {q: [learner.known(learned).features[COEXPRESSION]] for q, (learned, _) in plan.models.items() if q != ALL}
    frames = []
    for fit, sources in fits.items():
        for source in sources:
            rows = source.genes.isin(wanted)
            frames.append(GeneFeatures(source.source, source.genes[rows], source.values[rows]).to_frame(fit))
    empty = GeneFeatures("", pd.Index([], dtype=object), np.zeros((0, 1))).to_frame(ALL)
    return pd.concat(frames or [empty], ignore_index=True)
