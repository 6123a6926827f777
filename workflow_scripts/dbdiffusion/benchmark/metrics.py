"""Scores of predicted against observed effects, for all targets at once.

Every function takes `predicted` and `observed`, arrays (T targets x G genes) of effects (differences to the control mean,
in ln(1 + CP10k)), and `where`, a boolean array (T, G) of the genes that count for each target. It returns (T,) scores.
A score that is undefined is NaN: a correlation with a constant vector (the `control` baseline predicts the constant 0), a precision
without calls, a rank among one target, a target without a single gene.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

CONSTANT = 1e-9
"""A standard deviation or norm below this, in ln(1 + CP10k), is rounding error: the vector counts as constant."""

HIGHER_IS_BETTER = {
    "pearson_delta": True,
    "pearson_delta_perturbed": True,
    "spearman_delta": True,
    "mse": False,
    "weighted_mse": False,
    "discrimination": True,
    "sign_accuracy": True,
    "de_average_precision": True,
    "de_precision": True,
    "de_recall": True,
    "de_jaccard": True,
    "de_sign": True,
    "energy_distance": False,
    "mmd": False,
    "two_sample_auc": False,
    "mean_agreement": True,
    "variance_agreement": True,
    "zero_fraction_agreement": True,
    "correlation_agreement": True,
}
"""Direction of each metric. `slope` and `spread` have their best value at 1, between too little and too much."""


def _centred(values: np.ndarray, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values less their mean over the genes that count (0 elsewhere), and their standard deviation (NaN for no gene)."""
    n = where.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(where, values, 0.0).sum(axis=1) / n
        centred = np.where(where, values - mean[:, None], 0.0)
        sd = np.sqrt((centred**2).sum(axis=1) / n)
    return centred, sd


def _ratio(above: np.ndarray, below: np.ndarray, *, least: float = 0.0) -> np.ndarray:
    """above / below, NaN where below is not larger than `least`."""
    out = np.full(np.broadcast(above, below).shape, np.nan)
    return np.divide(above, below, out=out, where=np.asarray(below) > least)


def pearson_delta(*, predicted: np.ndarray, observed: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Pearson correlation over genes of predicted and observed effects; NaN if either is constant."""
    x, sx = _centred(predicted, where)
    y, sy = _centred(observed, where)
    defined = (sx > CONSTANT) & (sy > CONSTANT)
    n = where.sum(axis=1)
    return _ratio((x * y).sum(axis=1), np.where(defined, n * sx * sy, 0.0))


def pearson_delta_perturbed(*, predicted: np.ndarray, observed: np.ndarray, where: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Pearson correlation after subtracting `reference` (G,), the mean effect of the training perturbations.

    As in Systema (Vinas Torne et al. 2025): what all perturbations share earns nothing here, and the training mean itself,
    constant, has no score.
    """
    return pearson_delta(predicted=predicted - reference, observed=observed - reference, where=where)


def spearman_delta(*, predicted: np.ndarray, observed: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Spearman correlation over genes: Pearson correlation of average ranks among the genes that count."""
    flat = _centred(predicted, where)[1] <= CONSTANT

    def ranks(values: np.ndarray) -> np.ndarray:
        if not values.size:
            return np.zeros_like(values)
        return np.nan_to_num(stats.rankdata(np.where(where, values, np.nan), axis=1, nan_policy="omit"))

    score = pearson_delta(predicted=ranks(predicted), observed=ranks(observed), where=where)
    return np.where(flat, np.nan, score)


def mse(*, predicted: np.ndarray, observed: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Mean over genes of (predicted - observed)^2."""
    return _ratio(np.where(where, (predicted - observed) ** 2, 0.0).sum(axis=1), where.sum(axis=1))


def weighted_mse(*, predicted: np.ndarray, observed: np.ndarray, where: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """sum_j w_j (predicted_j - observed_j)^2 / sum_j w_j, weights (T, G) >= 0: the absolute effects in half A."""
    weights = np.where(where, weights, 0.0)
    error = np.where(where, (predicted - observed) ** 2, 0.0)
    return _ratio((weights * error).sum(axis=1), weights.sum(axis=1), least=CONSTANT)


def discrimination(*, predicted: np.ndarray, observed: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Rank of the true target among all targets by cosine of effects, from 0 (last) to 1 (first); 0.5 by chance.

    For target t over its own genes: the share of the other targets s with cos(predicted_t, observed_s) < cos(predicted_t, observed_t),
    ties counting half. NaN for one target alone, and for a predicted or observed effect of zero.
    """
    p = np.where(where, predicted, 0.0)
    square = where.astype(float) @ (observed**2).T
    length = np.sqrt((p**2).sum(axis=1))
    cosine = _ratio(p @ observed.T, np.where(length[:, None] > CONSTANT, length[:, None] * np.sqrt(square), 0.0), least=CONSTANT**2)
    own = np.diag(cosine)[:, None]
    others = np.isfinite(cosine) & ~np.eye(len(cosine), dtype=bool)
    # Equal up to rounding is a tie: identical predictions must not be ranked by the order of summation.
    tie = np.isclose(cosine, own, rtol=0, atol=1e-12)
    points = np.where(tie, 0.5, cosine < own)
    score = _ratio(np.where(others, points, 0.0).sum(axis=1), others.sum(axis=1))
    return np.where(np.isfinite(own[:, 0]), score, np.nan)


def sign_accuracy(*, predicted: np.ndarray, observed: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Share of genes whose predicted effect has the observed sign; a predicted 0 is half right; NaN if all predictions are 0."""
    moved = np.abs(predicted) > CONSTANT
    right = np.where(moved, np.sign(predicted) == np.sign(observed), 0.5)
    score = _ratio(np.where(where, right, 0.0).sum(axis=1), where.sum(axis=1))
    return np.where((moved & where).any(axis=1), score, np.nan)


def de_average_precision(*, predicted: np.ndarray, true: np.ndarray, where: np.ndarray) -> np.ndarray:
    """How well the size of predicted effects ranks the genes `true` (T, G) that the held-out cells call, whatever a threshold on it.

    Mean over these genes of the share of true ones among all genes predicted to change as much or more: the area under the curve of
    precision over recall, and by chance the share of true genes. NaN without a true gene.
    """

    def as_large(among: np.ndarray) -> np.ndarray:
        return stats.rankdata(np.where(among, -np.abs(predicted), np.nan), method="max", axis=1, nan_policy="omit")

    found = where & (true != 0)
    if not found.any():
        return np.full(len(predicted), np.nan)
    precision = _ratio(np.where(found, as_large(found), 0.0), np.where(found, as_large(where), 0.0))
    return _ratio(np.nansum(precision, axis=1), found.sum(axis=1))


def slope(*, predicted: np.ndarray, observed: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Slope of predicted on observed effects, cov(p, o) / var(o): below 1 the prediction is attenuated.

    Sampling error of the observed effects attenuates it too: compare with the slope of half A on half B, the ceiling.
    """
    x, _ = _centred(predicted, where)
    y, sy = _centred(observed, where)
    return _ratio((x * y).sum(axis=1), np.where(sy > CONSTANT, (y**2).sum(axis=1), 0.0))


def spread(*, predicted: np.ndarray, observed: np.ndarray, replicate: np.ndarray) -> np.ndarray:
    """Share of the observed spread between perturbations that the predictions have; its mean over targets is the trace ratio.

    Value of t: |p_t - mean p|^2 / mean_s <a_s - mean a, b_s - mean b>, with `observed` b and `replicate` a the two halves, whose product is
    free of sampling error. Near 0: mode collapse. Missing predictions (NaN rows) are left out. NaN for fewer than two targets, or where
    the halves agree on no spread.
    """
    out = np.full(len(predicted), np.nan)
    ok = np.isfinite(predicted).all(axis=1)
    if ok.sum() < 2:
        return out
    p, a, b = (values[ok] - values[ok].mean(axis=0) for values in (predicted, replicate, observed))
    shared = (a * b).sum(axis=1).mean()
    if shared > CONSTANT**2:
        out[ok] = (p**2).sum(axis=1) / shared
    return out


def de_scores(*, called: np.ndarray, true: np.ndarray) -> dict[str, np.ndarray]:
    """Agreement of two signed sets of calls (T, G) in -1, 0, 1: differential expression called, and called by the held-out cells.

    Regardless of sign, with C called and D true: precision |C&D| / |C|, recall |C&D| / |D|, Jaccard |C&D| / |C or D|;
    de_sign is the share of C&D with equal sign. NaN where the denominator is 0.
    """
    c, d = called != 0, true != 0
    both = (c & d).sum(axis=1)
    return {
        "de_precision": _ratio(both, c.sum(axis=1)),
        "de_recall": _ratio(both, d.sum(axis=1)),
        "de_jaccard": _ratio(both, (c | d).sum(axis=1)),
        "de_sign": _ratio((c & d & (called == true)).sum(axis=1), both),
    }


def effect_scores(
    *, predicted: np.ndarray, observed: np.ndarray, where: np.ndarray, reference: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """All per-gene metrics of this module. Genes that the method did not predict (NaN) do not count; a target without any has no score."""
    where = where & np.isfinite(predicted)
    predicted = np.where(where, predicted, 0.0)
    scores = {
        metric.__name__: metric(predicted=predicted, observed=observed, where=where)
        for metric in (pearson_delta, spearman_delta, mse, discrimination, sign_accuracy, slope)
    }
    scores["pearson_delta_perturbed"] = pearson_delta_perturbed(predicted=predicted, observed=observed, where=where, reference=reference)
    scores["weighted_mse"] = weighted_mse(predicted=predicted, observed=observed, where=where, weights=weights)
    return scores
