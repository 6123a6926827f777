"""Calls calibrated on pseudo-targets, which have both a prediction, made without their cells, and what their own cells say.

Two claims about target t and gene j, in the order of one score:

direction: t changes the mean of j, in the predicted direction. Of no effect, if noise is as often positive as
negative, an observed effect has the predicted direction half of the time. So calls of pseudo-targets with the wrong observed
direction, counted twice, are no fewer in expectation than calls without a true effect in that direction: a bound that needs no
test of single genes to have power, as in the selection by signs of Barber and Candes (2015).

selection: an experiment on t, as large as those of the screen, would call j differentially expressed (conformal selection, Jin
and Candes 2023). It is harder: where cells are few such an experiment misses most of the genes that change.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from dbdiffusion.inference.debias import Estimate, Queries, Screen, mix
from dbdiffusion.inference.ttest import benjamini_hochberg

PAIR_FEATURES = (
    "z",
    "expected_z",
    "neighbour_z",
    "neighbour_calls",
    "neighbour_signed_calls",
    "agreement",
    "effect",
    "gene_rate",
    "gene_signed_rate",
)
"""What is known of a target and a gene; the first EVIDENCE of them are also multiplied with the target's features."""
EVIDENCE = 5
TARGET_FEATURES = ("neighbour_strength", "predicted_strength", "coherence", "largest_weight", "confidence", "k_eff")
"""What is known of a target: how far its evidence can be believed."""
PENALTY = 10.0
"""Ridge penalty of the free score on standardised terms, and, per pair that a pseudo-target gives, of the shrunk one."""
PLAIN = PAIR_FEATURES.index("expected_z")
"""The term that the shrunk score keeps free: the predicted effect in standard errors of an experiment."""
FIT_PAIRS = 40000
"""About so many pairs fit a score; all of them calibrate it."""
SCORE_FOLDS = 5
"""Groups of pseudo-targets left out in turn when scores are fitted."""
ABSTAIN = (0.25, 0.2, 0.15, 0.1, 0.05)
"""Shares of pseudo-targets, those of least location confidence, that may be left out."""
KEPT, MIN_ABSTAIN = 0.97, 20
"""They are left out where this share of the true calls is kept without them, and where there are so many pseudo-targets to tell."""


@dataclass(frozen=True)
class Features:
    """What is known of R queries and G genes before any experiment: pair (R, G, F) and target (R, T), float32."""

    pair: np.ndarray
    target: np.ndarray

    def rows(self, at: np.ndarray) -> Features:
        return Features(self.pair[at], self.target[at])

    def expanded(self) -> np.ndarray:
        """All terms of the score (R, G, F + T + EVIDENCE T): pair, target, and products of evidence and target features."""
        r, g, _ = self.pair.shape
        target = np.broadcast_to(self.target[:, None, :], (r, g, self.target.shape[1]))
        cross = (self.pair[..., :EVIDENCE, None] * target[..., None, :]).reshape(r, g, -1)
        return np.concatenate([self.pair, target, cross], axis=-1)


def coherence(screen: Screen, queries: Queries) -> np.ndarray:
    """Do the neighbours of a query agree with one another? Weighted mean correlation (R,) of their effects, pairs of two."""
    z = np.clip(screen.effects.effect / np.maximum(screen.effects.se, 1e-9), -20, 20)
    z /= np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-9)
    similarity = z @ z.T
    np.fill_diagonal(similarity, 0.0)
    pairs = np.maximum(1.0 - (queries.local**2).sum(1), 1e-6)
    return (mix(queries.local, similarity) * queries.local).sum(1) / pairs


def features(screen: Screen, queries: Queries, found: Estimate, views: list[np.ndarray], at: np.ndarray | None = None) -> Features:
    """Features of queries from their estimate and from effects and calls of the training perturbations.

    views: effects (R, G) of each predictor; at: (R,) the queries' rows among the training perturbations when they are
    pseudo-targets, whose own labels are then left out of the gene's rate.
    """
    effects, labels = screen.effects, screen.labels.astype(np.float32)
    signed = labels * np.sign(effects.effect).astype(np.float32)
    sign = np.sign(found.effect).astype(np.float32)
    se = np.maximum(np.sqrt(found.variance + screen.control_sampling), 1e-9)
    typical = np.maximum(np.median(effects.se, axis=0), 1e-9)
    expected = np.abs(found.effect) / typical
    n, shape = len(effects.perturbations), found.effect.shape
    agreement = np.zeros(shape)
    for view in views:
        agreement += np.clip(sign * view / typical, -6, 6) / len(views)
    rate, signed_rate = labels.sum(0), signed.sum(0)
    if at is not None:
        rate, signed_rate, n = rate - labels[at], signed_rate - signed[at], n - 1
    columns = (
        np.log1p(np.abs(found.effect) / se),
        np.log1p(expected),
        np.clip(sign * queries.base / se, -10, 10),
        mix(queries.local, labels),
        sign * mix(queries.local, signed),
        agreement,
        np.sqrt(np.abs(found.effect)),
        np.sqrt(rate / max(n, 1)),
        sign * (signed_rate / max(n, 1)),
    )
    pair = np.empty((*shape, len(columns)), dtype=np.float32)
    for k, column in enumerate(columns):
        pair[..., k] = column
    target = (
        np.log1p(queries.local @ labels.sum(1)),
        np.log1p((expected**2).mean(1)),
        coherence(screen, queries),
        queries.local.max(1),
        queries.info["confidence"].to_numpy(dtype=float),
        np.log(np.maximum(queries.info["k_eff"].to_numpy(dtype=float), 1e-3)),
    )
    return Features(pair, np.column_stack(target).astype(np.float32))


FALSE_PER_WRONG = 2.0
"""False directions for each that is seen: where nothing changes, half of the observed directions are right by chance."""


def same_direction(effect: np.ndarray, observed: np.ndarray, total: np.ndarray, control: np.ndarray) -> np.ndarray:
    """Whether observed effects have the direction of predicted ones, all (R, G).

    total: error variance of the predictions (R, G), that of the control mean (G,) included. Both effects are differences to this
    mean, whose error would make them agree where nothing changes. Where there is no effect, the share control / total of a
    prediction is the control's error in expectation: so much is taken off the observation. Without a predicted direction nothing agrees.
    """
    known = (total > 0) & (total >= control)
    shared = np.divide(np.broadcast_to(control, total.shape), total, out=np.ones(total.shape), where=known)
    return (observed - shared * effect) * np.sign(effect) > 0


LEVELS = np.geomspace(0.001, 1.0, 200)
"""Levels of Benjamini-Hochberg at which the error of pseudo-targets is measured (fdr `target`)."""


@dataclass(frozen=True)
class _Null:
    """Calibration pairs with Y = 0: scores, ascending, and the summed weight of each and all above it."""

    scores: np.ndarray
    weight_above: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> _Null:
        """scores, labels (K, G), weights (K,)."""
        flat = scores[~labels]
        order = np.argsort(flat, kind="stable")
        mass = np.broadcast_to(weights[:, None], scores.shape)[~labels][order]
        return cls(flat[order], np.append(np.cumsum(mass[::-1])[::-1], 0.0))

    def above(self, scores: np.ndarray) -> np.ndarray:
        """Weight of the pairs with a score as high."""
        return self.weight_above[np.searchsorted(self.scores, scores, side="left")]


@dataclass(frozen=True)
class Selector:
    """Scores and their calibration on pseudo-targets.

    coefficients (1 + F + T + EVIDENCE T,): log odds of Y, intercept first; min_confidence: of targets with calls; null: out-of-fold
    scores of the calibration pairs with Y = 0; extra, pairs: weight of the target's own pair and of all calibration pairs;
    unit: `pooled` or `target`; curve: thresholds (of the score, or of the target's Benjamini-Hochberg q) and the nominal rate
    at which they are allowed; directions: thresholds of the score and the rate of false directions.
    """

    coefficients: np.ndarray
    min_confidence: float
    null: _Null
    extra: float
    pairs: float
    unit: str
    curve: tuple[np.ndarray, np.ndarray]
    directions: tuple[np.ndarray, np.ndarray]

    def score(self, x: Features) -> np.ndarray:
        """Log odds (R, G) that an experiment would call the pair."""
        return score(self.coefficients, x)

    def p_values(self, scores: np.ndarray) -> np.ndarray:
        """Conformal p of `Y = 0`: (1 + calibration pairs with Y = 0 and a score as high) / (1 + calibration pairs), weighted."""
        return np.minimum((self.extra + self.null.above(scores)) / (self.extra + self.pairs), 1.0)

    def q_values(self, scores: np.ndarray) -> np.ndarray:
        """The smallest nominal rate at which each pair (R, G) is selected; the better the score, the smaller."""
        if self.unit == "pooled":
            return _rate(self.curve, scores)
        grid, q = self.curve
        at = np.searchsorted(grid, benjamini_hochberg(self.p_values(scores)), side="left")
        return np.where(at < len(grid), q[np.minimum(at, len(grid) - 1)], 1.0)

    def q_directions(self, scores: np.ndarray) -> np.ndarray:
        """The smallest nominal rate at which each pair (R, G) is called with its direction."""
        return _rate(self.directions, scores)


def _rate(curve: tuple[np.ndarray, np.ndarray], scores: np.ndarray) -> np.ndarray:
    """Rate of the largest threshold that scores pass, 1 where they pass none."""
    grid, q = curve
    at = np.searchsorted(grid, scores, side="right") - 1
    return np.where(at >= 0, q[np.maximum(at, 0)], 1.0)


MAX_WEIGHT = 5.0
"""Largest weight, before weights are scaled to mean 1, and one over the smallest."""


def confidence_weights(pseudo: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights (K,) that make pseudo-targets as confidently located as the targets (T,) are, with mean 1; and the largest
    weight of anyone, targets included, which is what one more error counts.

    The odds that a perturbation of that confidence is a target, from a logistic regression with ridge penalty: the density
    ratio of weighted conformal prediction (Tibshirani et al. 2019), for targets that were not drawn as the measured perturbations were.
    """
    everyone = np.concatenate([pseudo, targets]).astype(float)
    width = everyone.std()
    if width < 1e-9 or not len(targets):
        return np.ones(len(pseudo)), 1.0
    z = (everyone - everyone.mean()) / width
    beta = ridge_logistic(z[:, None], np.arange(len(z)) >= len(pseudo), np.ones(1))
    weights = np.exp(beta[1] * z)
    weights = np.clip(weights / weights[: len(pseudo)].mean(), 1 / MAX_WEIGHT, MAX_WEIGHT)
    weights /= weights[: len(pseudo)].mean()
    return weights[: len(pseudo)], float(weights.max())


def pooled_curve(
    scores: np.ndarray, labels: np.ndarray, weights: np.ndarray, most: float = 1.0, count: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Thresholds (ascending) and the false discovery rate of `call all pairs with a score at least that`.

    The larger of two estimates from the K pseudo-targets (rows, with weights w), each with one error more than was seen, of
    weight m (`most`): pooled, (m + sum w false calls) / (sum w calls): conformal p-values with Benjamini-Hochberg over a
    population of targets; per target, (m + sum w false discovery proportions) / (m + sum w): the conformal risk control
    bound (Angelopoulos et al. 2024), for which the perturbation is the unit and dependence between its genes does not matter.
    Each threshold has the least rate among itself and looser ones, as in the step-up procedure. count: false calls that each
    call without its label stands for, the further error's too.
    """
    n_genes = scores.shape[1]
    flat = scores.ravel()
    order = np.argsort(-flat, kind="stable")
    false, owner = ~labels.ravel()[order], order // n_genes
    pooled = (most + np.cumsum(weights[owner] * false)) / np.cumsum(weights[owner])
    per_target = (most + _running_fdp(owner, false, weights)) / (most + weights.sum())
    rate = np.minimum(count * np.maximum(pooled, per_target), 1.0)
    ends = np.append(flat[order][1:] < flat[order][:-1], True)
    q = np.minimum.accumulate(rate[ends][::-1])
    return flat[order][ends][::-1], q


def _running_fdp(owner: np.ndarray, false: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted sum over targets of false / called after each pair, pairs in the order of calling; owner: target of a pair."""
    by_target = np.argsort(owner, kind="stable")
    count = np.bincount(owner, minlength=len(weights))
    first = np.repeat(np.cumsum(count) - count, count)
    total = np.cumsum(false[by_target])
    before = np.where(first > 0, total[first - 1], 0)
    fdp = (total - before) / (np.arange(len(owner)) - first + 1)
    change = np.diff(fdp, prepend=0.0)
    starts = np.cumsum(count) - count
    starts = starts[count > 0]
    change[starts] = fdp[starts]
    out = np.empty(len(owner))
    out[by_target] = change
    return np.cumsum(weights[owner] * out)


def target_curve(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray, most: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Levels of Benjamini-Hochberg within a target (ascending) and the mean false discovery proportion they give.

    Conformal p of each pseudo-target from the other ones, all with weights (K,); (m + sum w false discovery proportions) /
    (m + sum w) with m the weight of one more error (`most`), at the worst level not above: conformal risk control with the
    perturbation as unit.
    """
    n_targets, n_genes = scores.shape
    null = _Null.of(scores, labels, weights)
    p = np.empty(scores.shape)
    for k in range(n_targets):
        own = np.sort(scores[k][~labels[k]])
        above = null.above(scores[k]) - weights[k] * (len(own) - np.searchsorted(own, scores[k], side="left"))
        p[k] = (most + np.maximum(above, 0.0)) / (most + (weights.sum() - weights[k]) * n_genes)
    adjusted = benjamini_hochberg(np.minimum(p, 1.0))
    rate = np.empty(len(LEVELS))
    for i, level in enumerate(LEVELS):
        called = adjusted <= level
        false = (called & ~labels).sum(1) / np.maximum(called.sum(1), 1)
        rate[i] = (most + weights @ false) / (most + weights.sum())
    return LEVELS, np.minimum(np.maximum.accumulate(rate), 1.0)


def score(coefficients: np.ndarray, x: Features) -> np.ndarray:
    """Log odds (R, G). Products with target features are slopes of the target's own, so that nothing is expanded."""
    n_pair, n_target = x.pair.shape[-1], x.target.shape[-1]
    parts = np.split(coefficients, [1, 1 + n_pair, 1 + n_pair + n_target])
    slopes = np.tile(parts[1], (len(x.target), 1))
    slopes[:, :EVIDENCE] += x.target @ parts[3].reshape(EVIDENCE, n_target).T
    level = parts[0] + x.target @ parts[2]
    return np.einsum("rgf,rf->rg", x.pair, slopes.astype(np.float32)) + level[:, None]


def _log_odds(x: Features, labels: np.ndarray) -> np.ndarray:
    """Intercept and coefficients of the log odds of labels (K, G); the rate alone where there is one class.

    The mean of two ridge fits on standardised terms. In the first all pairs count as independent; with many pseudo-targets
    it is the better one. In the second only pseudo-targets do: the penalty grows with the pairs that each of them gives, but
    for the predicted effect itself, to which the score then shrinks; with few pseudo-targets the free fit learns these few
    by heart.
    """
    terms = x.expanded()
    terms, y = terms.reshape(-1, terms.shape[-1]), labels.ravel()
    if y.all() or not y.any():
        rate = np.clip(y.mean(), 1e-4, 1 - 1e-4)
        return np.append(np.log(rate / (1 - rate)), np.zeros(terms.shape[1]))
    centre, width = terms.mean(0), terms.std(0)
    width = np.where(width > 1e-6, width, np.inf)
    free = np.full(terms.shape[1], PENALTY)
    shrunk = free * labels.shape[1]
    shrunk[PLAIN] = PENALTY
    terms = (terms - centre) / width
    beta = (ridge_logistic(terms, y, free) + ridge_logistic(terms, y, shrunk)) / 2
    slope = beta[1:] / width
    return np.append(beta[0] - slope @ centre, slope)


def ridge_logistic(x: np.ndarray, y: np.ndarray, penalty: np.ndarray) -> np.ndarray:
    """Intercept and slopes (1 + F,) that minimise the logistic loss of y (N,) on x (N, F) plus half the penalties (F,) times the
    squared slopes, by Newton steps, halved where the loss would grow."""
    design = np.column_stack([np.ones(len(x)), x]).astype(float)
    ridge = np.append(0.0, penalty)
    sign = np.where(y, -1.0, 1.0)

    def loss(beta: np.ndarray) -> float:
        return float(np.logaddexp(0.0, sign * (design @ beta)).sum() + 0.5 * ridge @ beta**2)

    beta = np.zeros(design.shape[1])
    rate = y.mean()
    beta[0] = np.log(rate / (1 - rate))
    now = loss(beta)
    for _ in range(50):
        p = expit(design @ beta)
        gradient = design.T @ (p - y) + ridge * beta
        # A little more curvature than there is, where all p are near 0 or 1.
        curve = (design * np.maximum(p * (1 - p), 1e-6)[:, None]).T @ design + np.diag(ridge)
        step = np.linalg.solve(curve + 1e-9 * np.eye(len(beta)), gradient)
        while loss(beta - step) > now and np.abs(step).max() > 1e-9:
            step /= 2
        beta = beta - step
        before, now = now, loss(beta)
        if before - now <= 1e-8 * abs(before):
            break
    return beta


@dataclass(frozen=True)
class Scored:
    """Pseudo-targets scored out of fold: coefficients of the score of targets; scores and labels (K, G), location confidence (K,);
    agrees: whether their cells show the predicted direction (K, G)."""

    coefficients: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    confidence: np.ndarray
    agrees: np.ndarray

    def calibrated(self, unit: str, q: float, targets: np.ndarray | None = None) -> Selector:
        """The selector that aims to hold q; unit: `pooled` or `target`; targets: location confidence (T,) of the targets where
        they were not drawn as the pseudo-targets were, which are then weighted.

        Where pseudo-targets of low location confidence hold (almost) none of the true calls at rate q, they are left out and
        targets as uncertain get no calls.
        """
        kept = _confident(self.scores, self.labels, self.confidence, q)
        scores, labels = self.scores[kept], self.labels[kept]
        least = float(self.confidence[kept].min()) if not kept.all() else -np.inf
        weights, most = np.ones(len(scores)), 1.0
        if targets is not None:
            weights, most = confidence_weights(self.confidence[kept], targets[targets >= least])
        curve = (pooled_curve if unit == "pooled" else target_curve)(scores, labels, weights, most)
        null = _Null.of(scores, labels, weights)
        directions = pooled_curve(scores, self.agrees[kept], weights, most, FALSE_PER_WRONG)
        return Selector(self.coefficients, least, null, most, weights.sum() * scores.shape[1], unit, curve, directions)


def fit_scores(x: Features, labels: np.ndarray, agrees: np.ndarray, folds: np.ndarray, pairs: int, random: np.random.Generator) -> Scored:
    """Fit scores on the features and labels (K, G) of pseudo-targets, out of fold; agrees (K, G): as in `Scored`.

    Scores of pseudo-targets come from a fit without their fold; those of targets from the mean of the fits. pairs: at most
    so many pairs, the same genes for every pseudo-target.
    """
    n_targets, n_genes = labels.shape
    per_target = max(1, min(n_genes, pairs // n_targets))
    if per_target < n_genes:
        genes = np.sort(random.permutation(n_genes)[:per_target])
        x, labels, agrees = Features(x.pair[:, genes], x.target), labels[:, genes], agrees[:, genes]
    scores = np.empty(labels.shape)
    every = []
    folds = folds % SCORE_FOLDS
    for h in range(int(folds.max()) + 1):
        out = np.flatnonzero(folds == h)
        rest = np.flatnonzero(folds != h)
        thin = np.arange(0, labels.shape[1], max(1, len(rest) * labels.shape[1] // FIT_PAIRS))
        every.append(_log_odds(Features(x.pair[np.ix_(rest, thin)], x.target[rest]), labels[np.ix_(rest, thin)]))
        scores[out] = score(every[-1], x.rows(out))
    return Scored(np.mean(every, axis=0), scores, labels, x.target[:, TARGET_FEATURES.index("confidence")], agrees)


def _confident(scores: np.ndarray, labels: np.ndarray, confidence: np.ndarray, q: float) -> np.ndarray:
    """Which pseudo-targets (K,) stay in: all but the largest share of least confidence that holds (almost) no true call.

    Calls are those that conformal selection makes at rate q with everyone in, so that no threshold is chosen for the calls it would
    give; calls of direction leave the same ones out.
    """
    everyone = np.ones(len(scores), dtype=bool)
    grid, rates = pooled_curve(scores, labels, np.ones(len(scores)))
    allowed = np.flatnonzero(rates <= q)
    if len(scores) < MIN_ABSTAIN or not len(allowed):
        return everyone
    true = ((scores >= grid[allowed[0]]) & labels).sum(1)
    for share in ABSTAIN:
        kept = confidence > np.quantile(confidence, share)
        if true[kept].sum() >= KEPT * true.sum():
            return kept
    return everyone
