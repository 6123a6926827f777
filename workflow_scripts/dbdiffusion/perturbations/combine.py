"""Combinations of perturbations as sums of their parts: A+B is A's effect plus B's effect, each measured or located.

Measured combinations say how far sums can be trusted: each is predicted from its parts as if it were not measured, with its parts
measured or located themselves. Where enough of them agree that the plain sum over- or undershoots, the parts are scaled.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from dbdiffusion.data.sets import CONTROL, LocationSet
from dbdiffusion.data.splits import parts
from dbdiffusion.perturbations.locators import Confidence, Known, Placed, Ranked, place

MIN_COMBINATIONS = 4  # fewer measured combinations of a kind: the plain sum
PENALTIES = (4.0, 1.0)  # combinations that weigh for the plain sum in the ridge fit of the factors
TERMS = {"measured": ("stronger", "weaker"), "mixed": ("measured", "located"), "located": ("located",)}
"""Kind of a combination, by which of its parts are measured -> the groups of its parts that have a factor each."""


def kind_of(measured: int, located: int) -> str:
    """Kind of a combination with so many measured and so many located parts."""
    return "measured" if not located else "mixed" if measured else "located"


def groups_of(measured: Sequence[str], located: Sequence[str], strength: Mapping[str, float]) -> list[list[str]]:
    """The parts of a combination in the groups that have a factor each. Of several measured parts all but the strongest are weaker."""
    if located:
        return [list(measured), list(located)] if measured else [list(located)]
    order = sorted(measured, key=lambda name: -strength[name])
    return [order[:1], order[1:]]


@dataclass(frozen=True)
class Trial:
    """A measured combination predicted from its parts: terms (T, G) are the scaled effects of its groups of parts (`TERMS`), truth (G,)
    its own, base the squared distance of the training mean to it; score: the least confidence of a located part, 1 without any."""

    name: str
    kind: str
    terms: np.ndarray
    truth: np.ndarray
    base: float
    score: float

    def error(self, factors: np.ndarray) -> float:
        """Squared distance of the scaled sum to the measured effect."""
        return float(((self.truth - factors @ self.terms) ** 2).sum())


@dataclass(frozen=True)
class Rule:
    """How combinations of one kind are summed: a factor for each of their groups of parts; and the chance, by the measured ones, that
    the sum is closer to a combination's effect than the training mean, as a function of the least confidence of a located part."""

    factors: tuple[float, ...]
    confidence: Confidence | None

    def believed(self, score: float) -> float:
        """Confidence of a combination. Without a measured one of the kind, an even chance times that of its parts."""
        return 0.5 * score if self.confidence is None else float(self.confidence(np.array([score]))[0])


@dataclass(frozen=True)
class Sums:
    """Rules by kind, and the strength (norm of the scaled effect) of measured singles, which tells the stronger part."""

    rules: Mapping[str, Rule]
    strength: Mapping[str, float] = field(repr=False)

    @classmethod
    def learn(cls, trials: Sequence[Trial], strength: Mapping[str, float]) -> Sums:
        """One rule for each kind, from the trials of that kind alone."""
        return cls({kind: learn_rule([t for t in trials if t.kind == kind], len(terms)) for kind, terms in TERMS.items()}, strength)

    def label(self, kind: str) -> str:
        """`additive`, with the factors where they are not 1."""
        factors = self.rules[kind].factors
        if all(factor == 1 for factor in factors):
            return "additive"
        return f"additive({' + '.join(f'{f:.2f} {name}' for f, name in zip(factors, TERMS[kind], strict=True))})"


def learn_rule(trials: Sequence[Trial], terms: int) -> Rule:
    """Factors c of a kind's groups of parts, and its confidence.

    c minimises sum_n |y_n - sum_g c_g x_ng|² + kappa s sum_g (c_g - 1)², x_ng the summed effects of group g, s their mean squared
    length: ridge regression shrunk towards the plain sum, coefficients shared by all genes; one factor for all groups, or one for each.
    Form and kappa have the smallest leave-one-combination-out error; the plain sum stays unless it is worse by more than one standard
    error of the difference, and where fewer than MIN_COMBINATIONS were measured.
    """
    plain = np.ones(terms)
    if not trials:
        return Rule(tuple(plain), None)
    names = sorted({trial.name for trial in trials})
    left_out = [plain] * len(trials)
    chosen = plain
    if len(names) >= MIN_COMBINATIONS:
        of = np.array([names.index(trial.name) for trial in trials])
        usual = _by_name([trial.error(plain) for trial in trials], of)
        best = 0.0
        for basis, penalty in _options(terms):
            without = [_fit([t for t, home in zip(trials, of, strict=True) if home != one], basis, penalty) for one in range(len(names))]
            gain = usual - _by_name([trial.error(without[home]) for trial, home in zip(trials, of, strict=True)], of)
            if gain.mean() > max(gain.std(ddof=1) / np.sqrt(len(gain)), best):
                best, chosen = gain.mean(), _fit(trials, basis, penalty)
                left_out = [without[home] for home in of]
    better = np.array([trial.error(factors) < trial.base for trial, factors in zip(trials, left_out, strict=True)])
    return Rule(tuple(map(float, chosen)), Confidence.fit(np.array([trial.score for trial in trials]), better))


def _options(terms: int) -> Iterator[tuple[np.ndarray, float]]:
    """(basis of the factors, penalty), the most cautious first."""
    for basis in (np.ones((terms, 1)), np.eye(terms))[: min(terms, 2)]:
        yield from ((basis, penalty) for penalty in PENALTIES)


def _by_name(values: Sequence[float], of: np.ndarray) -> np.ndarray:
    """Mean of the trials of each combination: a mixed one has a trial for each part that is located."""
    return np.bincount(of, weights=values) / np.bincount(of)


def _fit(trials: Sequence[Trial], basis: np.ndarray, penalty: float) -> np.ndarray:
    """Factors (T,) = basis @ coefficients of the penalised fit."""
    gram = np.sum([trial.terms @ trial.terms.T for trial in trials], axis=0)
    cross = np.sum([trial.terms @ trial.truth for trial in trials], axis=0)
    prior = penalty * np.trace(gram) / (len(trials) * len(gram)) + 1e-12
    system = basis.T @ (gram + prior * np.eye(len(gram))) @ basis
    return basis @ np.linalg.solve(system, basis.T @ (cross + prior))


def spared(weights: np.ndarray, names: Sequence[str], barred: Collection[str]) -> np.ndarray | None:
    """Weights (P,) over names with those of barred neighbours given to the others; None where too little is left to scale.

    Weights of mixed sign may leave a sum near zero beside large terms: scaled up they would be a place of their own making.
    """
    taken = np.array([name in barred for name in names], dtype=bool)
    if not weights[taken].any():
        return weights
    free = np.where(taken, 0.0, weights)
    left = free.sum()
    return free * (weights.sum() / left) if left > 1e-9 and np.abs(free).sum() <= 3 * left else None


def locate_all(
    queries: Sequence[str],
    roles: Sequence[str],
    known: Known,
    ranking: Sequence[Ranked],
    measured_parts: Sequence[str],
    sums: Sums,
    neighbours: pd.Index,
) -> LocationSet:
    """Places of singles and combinations over `neighbours` (perturbations) and the control.

    A single has the weights of its locator. A combination has the sum of its parts' weights - 1 on the part itself where it is among
    `measured_parts`, the located weights otherwise, without the other located parts (`spared`) - each times the factor of its group
    (`Sums`), and the rest on the control, whose effect is zero, so that rows sum to 1 and the located effect is the sum of the parts'
    scaled effects. Confidence of a combination: the chance that its sum beats the training mean, as it is with the single's, from
    measured combinations of the same kind. It is not locatable when one of its parts is not, or is like nothing but another located part.
    """
    measured = set(measured_parts)
    wanted = sorted({gene for query in queries for gene in parts(query) if len(parts(query)) == 1 or gene not in measured})
    placed = place(wanted, known, ranking)
    row_of = {name: number for number, name in enumerate(wanted)}
    columns = neighbours.append(pd.Index([CONTROL]))
    at = columns.get_indexer(known.measured)
    weights = np.zeros((len(queries), len(columns)))
    records = []
    for row, (query, role) in enumerate(zip(queries, roles, strict=True)):
        genes = parts(query)
        single = len(genes) == 1
        own = [] if single else [gene for gene in genes if gene in measured]
        located = [gene for gene in genes if gene not in own]
        kind = kind_of(len(own), len(located))
        own_place = {gene: spared(placed.weights[row_of[gene]], known.measured, set(located) - {gene}) for gene in located}
        lost = [gene for gene in located if placed.reasons[row_of[gene]] or own_place[gene] is None]
        if not lost:
            factors = (1.0,) if single else sums.rules[kind].factors
            for factor, group in zip(factors, [genes] if single else groups_of(own, located, sums.strength), strict=True):
                for gene in group:
                    if gene in own:
                        weights[row, columns.get_loc(gene)] += factor
                    else:
                        weights[row, at] += factor * own_place[gene]
            weights[row, -1] += 0.0 if single else 1.0 - weights[row].sum()
        score = min((float(placed.confidence[row_of[gene]]) for gene in located), default=1.0)
        records.append(
            {
                "query": query,
                "role": role,
                "k_eff": 0.0 if lost else float(1.0 / (weights[row] ** 2).sum()),
                "confidence": 0.0 if lost else score if single else sums.rules[kind].believed(score),
                "kind": "single" if single else "additive",
                "parts_measured": len(own),
                **_status(placed, row_of, lost, single),
                "locator": "; ".join(_labels(placed, [row_of[gene] for gene in located], None if single else sums.label(kind))),
            }
        )
    info = pd.DataFrame(records, columns=["query", *LocationSet.INFO]).set_index("query")
    return LocationSet(pd.Index(list(queries)), columns, weights, info)


def _status(placed: Placed, row_of: Mapping[str, int], lost: Sequence[str], single: bool) -> dict[str, str]:
    if not lost:
        return {"status": "located", "reason": ""}
    reason = placed.reasons[row_of[lost[0]]] or "nothing but another part of the combination is like it"
    return {"status": "not_locatable", "reason": reason if single else f"part {lost[0]}: {reason}"}


def _labels(placed: Placed, rows: Sequence[int], combined: str | None) -> list[str]:
    return [*([combined] if combined else []), *sorted({placed.labels[row] for row in rows} - {""})]
