"""Locations of a fold: where targets and pseudo-targets stand among the measured perturbations, each without its own cells."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from dbdiffusion.config.datasets import FeatureSource
from dbdiffusion.config.embedding import ClustersConfig, EmbeddingConfig, LocationConfig
from dbdiffusion.data.sets import CONTROL, EffectSet, LocationSet
from dbdiffusion.data.splits import Splits, parts, without
from dbdiffusion.perturbations.abstention import abstain, coverage, threshold
from dbdiffusion.perturbations.clusters import clusters_frame, gene_clusters, perturbation_clusters
from dbdiffusion.perturbations.combine import Sums, Trial, groups_of, kind_of, locate_all, spared
from dbdiffusion.perturbations.embedding import Embedding, embed, scaled_effects, training_of
from dbdiffusion.perturbations.features import (
    COEXPRESSION,
    CellSums,
    GeneFeatures,
    cell_sums,
    coexpression,
    load_features,
    names_frame,
    nonzero,
    read_aliases,
)
from dbdiffusion.perturbations.locators import Clustering, Fold, Known, Locator, Ranked, candidates, place, rank
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
            own = nonzero(GeneFeatures(COEXPRESSION, genes, values))
            # Unlike a file, cells know nothing of a gene without features: it is not expressed.
            features = {COEXPRESSION: replace(own, names={gene: gene for gene in own.genes}), **features}

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
    gene_names: str | Path,
    aliases: str | Path | None = None,
) -> None:
    """Locate a fold's targets and pseudo-targets; write contracts `locations`, `clusters`, `gene_features` and `gene_names`.

    Fit `all` places targets over all training perturbations, and each pseudo-target over the others, with features, clusters
    and locator that its cross-fit fold's cells had no part in. Fit q places the pseudo-targets of model q and the targets
    over the perturbations the model learns from. No cell of a target is read; none of fold q enters fit q.
    """
    measured, split = EffectSet.read(effects), Splits.read(splits)
    plan = Plan.make(measured, split, fold, seed)
    targets = split.targets(fold)
    other_names = read_aliases(aliases) if aliases else {}
    learner = make_learner(cells, measured, plan, targets, features, location, clusters, seed, other_names)
    locators = candidates(location, [source.name for source in features if source.name in known_sources(learner)])
    fits = locate_fold(learner, locators, targets, MIXTURE.get(location.locator, "no"))
    LocationSet.write(fits | {ALL: with_abstention(fits[ALL], measured, location)}, locations)
    contracts.GENE_FEATURES.write(features_frame(learner, targets), gene_features)
    known = learner.known(plan.training).features
    genes = [{gene for name in names for gene in parts(name)} for names in (plan.training, targets)]
    contracts.GENE_NAMES.write(names_frame({s.name: known.get(s.name) for s in features}, *genes, other_names), gene_names)
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
    aliases: Mapping[str, Sequence[str]] | None = None,
) -> Learner:
    """Read the feature files, by genes' names or their aliases, and the training and control cells once, in groups that are always
    learned from together."""
    anchors = singles(plan.training)
    others = sorted({gene for name in [*plan.training, *targets] for gene in parts(name)} - set(anchors))
    fixed = {}
    for source in features:
        if source.kind != "coexpression" and (found := load_features(source, anchors, others, aliases)) is not None:
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


def learn_sums(learner: Learner, ranking: Sequence[Ranked], model: str | None) -> Sums:
    """How combinations are summed in the whole fold (none), or in a model without its pseudo-targets' cells."""
    learned = learner.plan.training if model is None else learner.plan.models[model][0]
    values = dict(zip(learned, scaled_effects(learner.effects.subset(learned), "standard_error")[0], strict=True))
    strength = {name: float(np.linalg.norm(values[name])) for name in singles(learned)}
    return Sums.learn(list(combination_trials(learner, ranking, model, values, strength)), strength)


def combination_trials(
    learner: Learner, ranking: Sequence[Ranked], model: str | None, values: Mapping[str, np.ndarray], strength: Mapping[str, float]
) -> Iterator[Trial]:
    """Measured combinations predicted from their parts, each measured part taken as measured and as unmeasured.

    A part is located in the fold of the choice in which it, or else another part of the combination, is a query: without its own cells
    and those of the combination. (Where no part was measured alone, co-expression knows the combination's cells among all others.)
    No other located part is among its neighbours, since it would not be there if it were unmeasured too; a measured part may be.
    """
    folds = learner.plan.choice(model)
    mean = np.mean(list(values.values()), axis=0)
    # The distance to the mean of the others is that to the mean of all, times this.
    without_one = len(values) / max(len(values) - 1, 1)
    home = {query: number for number, (_, queries) in enumerate(folds) for query in queries}
    wanted: dict[int, set[str]] = {}
    for name in (name for name in values if len(parts(name)) > 1):
        for gene in parts(name):
            wanted.setdefault(_home(gene, name, home), set()).add(gene)
    places = {}
    for number in [number for number in wanted if folds]:
        known = learner.known(folds[number][0])
        placed = place(sorted(wanted[number]), known, ranking)
        effects = np.array([values[name] for name in known.measured])
        for row, gene in enumerate(sorted(wanted[number])):
            places[number, gene] = (known.measured, effects, placed.weights[row], float(placed.confidence[row]), placed.reasons[row])
    for name in (name for name in values if len(parts(name)) > 1):
        base = float(((values[name] - mean) ** 2).sum()) * without_one**2
        for own, located in _ways(parts(name), strength):
            found = {gene: places.get((_home(gene, name, home), gene)) for gene in located}
            spare = {gene: spared(at[2], at[0], located) if at and not at[-1] else None for gene, at in found.items()}
            if any(weights is None for weights in spare.values()):
                continue
            effect = {gene: values[gene] for gene in own} | {gene: spare[gene] @ found[gene][1] for gene in located}
            terms = np.array([np.sum([effect[gene] for gene in group], axis=0) for group in groups_of(own, located, strength)])
            score = min((place[3] for place in found.values()), default=1.0)
            yield Trial(name, kind_of(len(own), len(located)), terms, values[name], base, score)


def _home(gene: str, combination: str, home: Mapping[str, int]) -> int:
    """The fold of the choice that knows neither the gene's cells nor the combination's."""
    return next((home[name] for name in (gene, *parts(combination)) if name in home), 0)


def _ways(genes: Sequence[str], measured: Mapping[str, float]) -> Iterator[tuple[list[str], list[str]]]:
    """(parts taken as measured, parts to locate) of a combination: all there are of two parts; of more, those that are measured."""
    own = [gene for gene in genes if gene in measured]
    for hidden in itertools.product((False, True), repeat=len(own)) if len(genes) == 2 else [(False,) * len(own)]:
        taken = [gene for gene, hide in zip(own, hidden, strict=True) if not hide]
        yield taken, [gene for gene in genes if gene not in taken]


def locate_fold(learner: Learner, locators: Sequence[Locator], targets: Sequence[str], mixture: str = "compare") -> dict[str, LocationSet]:
    """Fit -> locations: "all", and one for each cross-fit model."""
    plan = learner.plan
    everyone = learner.effects.perturbations
    whole = plan.training
    ranking = choose(learner, locators, None, mixture)
    sums = learn_sums(learner, ranking, None)
    pieces = [locate_all(targets, ["target"] * len(targets), learner.known(whole), ranking, singles(whole), sums, everyone)]
    fits: dict[str, LocationSet] = {}
    for q, (learned, pseudo) in plan.models.items():
        if q == ALL:
            continue
        ranking = choose(learner, locators, q, mixture)
        sums = learn_sums(learner, ranking, q)
        queries, roles = [*pseudo, *targets], ["pseudo"] * len(pseudo) + ["target"] * len(targets)
        fits[q] = locate_all(queries, roles, learner.known(learned), ranking, singles(learned), sums, pd.Index(learned))
        # For debiasing, the other pseudo-targets of the fold may be neighbours, but they taught neither features nor choice.
        known = learner.known(learned, measured=whole)
        pieces.append(locate_all(pseudo, ["pseudo"] * len(pseudo), known, ranking, singles(learned), sums, everyone))
    return {ALL: _joined(pieces), **fits}


def with_abstention(located: LocationSet, effects: EffectSet, location: LocationConfig) -> LocationSet:
    """The locations that debiasing uses, targets of too little confidence made not locatable (config location.min_confidence).

    Locations inside the cross-fit models stay: a threshold that pseudo-targets give has seen the cells of every cross-fit fold.
    """
    if location.min_confidence != "auto":
        return abstain(located, location.min_confidence)
    info = located.info
    pseudo = ((info["role"] == "pseudo") & (info["status"] == "located") & (info["kind"] == "single")).to_numpy()
    values = scaled_effects(effects, "standard_error")[0]
    truth = values[effects.perturbations.get_indexer(located.queries[pseudo])]
    covered = coverage(located.weights[pseudo, :-1], values, truth, location.coverage)
    minimum = threshold(info["confidence"].to_numpy(dtype=float)[pseudo], covered, location.coverage)
    share = f"{covered.mean():.3f}" if len(covered) else "unknown"
    logger.info("coverage of all %d pseudo-targets %s, smallest confidence with nominal coverage %.3g", len(covered), share, minimum)
    return abstain(located, minimum, ("single",))


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
