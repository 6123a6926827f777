"""The debiased estimate and its variance (docs of the method: estimator, pseudo-targets, moderated variance).

Everything is done on effects (mean less control mean). With E_k the observed effect of training perturbation k, w_qk the
weight of k for query q and G the effect that a predictor gives, the neighbour mean is N_q = sum_k w_qk E_k and

    theta_q = control + N_q + sum_v lambda_v Z_vq

where a variate Z is either `debiased`, G_q - sum_k w_qk G_k (so that one predictor with weight lambda gives
lambda G_q + sum_k w_qk (E_k - lambda G_k), the estimator of dbDiffusion for lambda = 1), or `raw`, G_q - N_q, which
replaces the neighbour mean by the prediction itself (used for stacking only).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.stats import norm
from scipy.stats import t as student

from dbdiffusion.config.inference import InferenceConfig
from dbdiffusion.data.sets import CONTROL, EffectSet, LocationSet, MeanSet
from dbdiffusion.inference import stack, ttest, variance
from dbdiffusion.runtime.seeds import rng

MIN_PSEUDO = 3
"""Fewer pseudo-targets of a kind: nothing can be tuned or calibrated for it."""
MAX_FOLDS = 10
FACTORS = (0.1, 4.0)
"""Range of the factor that fits intervals to their level."""
TAILS = (1e4, 30.0, 15.0, 10.0, 7.0, 5.0, 4.0)
"""Degrees of freedom that fit the errors' tails, tried from the lightest to the heaviest."""
TAIL_LEVEL = 0.995
"""Level at which the tails must hold too."""
TELLING = 0.35
"""Share of the pairs that tell it: those with the largest model variance beside the observation's sampling variance."""
LARGEST = 0.10
"""Share of the pairs with the very largest, which have a factor of their own: there perturbations differ most."""
MIN_BY_SIZE = 20
"""Fewer pseudo-targets have one factor: they tell too little of how errors depend on the size of tau^2."""
SLOPE_POINTS = (0.90, 0.98)
"""Shares of the pairs with a smaller prediction: up to the first the slope is that of small ones, from the second on of large ones."""
STRONGEST = 0.05
"""Share of a target's genes that are those of strongest predicted effect."""
ROUNDS = 3
"""Times that variance by strength and by size of tau^2 are fitted to what the other leaves."""
TAIL_PAIRS = 500_000
"""About so many of them are looked at."""
CHUNK = 4_000_000
"""Pairs of target and gene handled at once."""


def strongest(effect: np.ndarray) -> np.ndarray:
    """Genes of strongest predicted effect of each target (R, G), those without any left out."""
    size = np.abs(effect)
    return (size >= np.quantile(size, 1 - STRONGEST, axis=1, keepdims=True)) & (size > 0)


def sampling_variance(effects: EffectSet) -> np.ndarray:
    """Variance (P, G) of observed means over cells, s^2/n, with s^2 squeezed to the gene's pooled one."""
    n = np.maximum(effects.n_cells, 1)[:, None]
    return variance.cell_variance(effects.variance, effects.n_cells) / n


@dataclass(frozen=True)
class Screen:
    """Measured perturbations (P, G): effects, sampling variance of their means, labels of their own test; and
    the control mean's sampling variance (G,), from the larger of the control's and the perturbations' cell variance."""

    effects: EffectSet
    sampling: np.ndarray
    labels: np.ndarray
    control_sampling: np.ndarray

    @classmethod
    def of(cls, effects: EffectSet, fdr: float) -> Screen:
        labels = ttest.de_labels(effects.effect, effects.se, effects.n_cells, fdr)
        # A gene that no control cell expresses has variance 0 there, which is not a mean without error.
        freedom = np.maximum(effects.n_cells - 1.0, 0.0)
        pooled = freedom @ np.nan_to_num(effects.variance) / max(freedom.sum(), 1.0)
        control = np.maximum(effects.control_variance, pooled) / max(effects.control_n, 1)
        return cls(effects, sampling_variance(effects), labels, control)


@dataclass(frozen=True)
class Queries:
    """Located queries: weights (R, P) over training perturbations (control has effect 0 and drops out), and what follows.

    base: neighbour mean of effects (R, G); sampling: sum w^2 s^2/n (R, G); sum_sq: sum w^2 (R,); local: |w| normalised;
    local_df: 1 / sum local^2 - 1 (R,), 0 for additive locations.
    """

    names: pd.Index
    weights: np.ndarray
    info: pd.DataFrame
    base: np.ndarray
    sampling: np.ndarray
    sum_sq: np.ndarray
    local: np.ndarray
    local_df: np.ndarray

    @classmethod
    def of(cls, screen: Screen, locations: LocationSet) -> Queries:
        weights = locations.weights[:, :-1]
        size = np.abs(weights)
        total = size.sum(1, keepdims=True)
        local = np.divide(size, total, out=np.zeros_like(size), where=total > 0)
        square = (local**2).sum(1)
        df = np.where(square > 0, 1.0 / np.maximum(square, 1e-12) - 1.0, 0.0)
        additive = (locations.info["kind"] == "additive").to_numpy()
        return cls(
            locations.queries,
            weights,
            locations.info,
            mix(weights, screen.effects.effect),
            mix(weights**2, screen.sampling),
            (weights**2).sum(1),
            local,
            np.where(additive, 0.0, np.maximum(df, 0.0)),
        )

    def rows(self, at: np.ndarray) -> Queries:
        values = (getattr(self, name)[at] for name in ("base", "sampling", "sum_sq", "local", "local_df"))
        return Queries(self.names[at], self.weights[at], self.info.iloc[at], *values)

    def __len__(self) -> int:
        return len(self.names)


def mix(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """weights (R, P) @ values (P, G), sparse where most weights are 0."""
    if weights.size and np.count_nonzero(weights) < 0.1 * weights.size:
        return sparse.csr_array(weights) @ values
    return weights @ values


@dataclass(frozen=True)
class Predictor:
    """A predictor's effects: of training perturbations as their residuals need them, and of the queries.

    neighbours, neighbours_mc: (P, G), 0 where unknown; known: (P,); out_of_fold: whether training perturbations were
    predicted without their own cells (then there are pseudo-targets).
    """

    name: str
    means: MeanSet
    control: np.ndarray
    neighbours: np.ndarray
    neighbours_mc: np.ndarray
    known: np.ndarray
    out_of_fold: bool

    @classmethod
    def of(cls, name: str, means: MeanSet, effects: EffectSet) -> Predictor:
        """Effects of a MeanSet, against its own generated control where it has one, else against the observed control mean.

        Training perturbations are taken in role `pseudo`; a set without any such row (published design: one model that
        saw them all) is taken in role `train`.
        """
        genes = means.genes.get_indexer(effects.genes)
        if (genes < 0).any():
            missing = list(effects.genes[genes < 0][:5])
            raise ValueError(f"means of {name!r} lack genes of the panel: {missing}")
        mean = means.mean[:, genes] if not np.array_equal(genes, np.arange(len(means.genes))) else means.mean
        mc = means.mc_variance[:, genes] if mean is not means.mean else means.mc_variance
        own = means.rows([CONTROL])[0]
        control = mean[own] if own >= 0 else effects.control_mean
        out_of_fold = bool((means.roles == "pseudo").any())
        at = means.rows(effects.perturbations)
        known = (at >= 0) & np.isin(means.roles[np.maximum(at, 0)], ["pseudo"] if out_of_fold else ["train", "pseudo"])
        take = np.maximum(at, 0)
        ordered = MeanSet(means.perturbations, means.roles, effects.genes, mean, mc)
        return cls(
            name,
            ordered,
            control,
            np.where(known[:, None], mean[take] - control, 0.0),
            np.where(known[:, None], mc[take], 0.0),
            known,
            out_of_fold,
        )

    def effects_of(self, names: pd.Index, role: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Effects (R, G), Monte-Carlo variance (R, G) and whether the predictor knows the query in that role (R,)."""
        at = self.means.rows(names)
        known = (at >= 0) & (self.means.roles[np.maximum(at, 0)] == role)
        take = np.maximum(at, 0)
        effect = np.where(known[:, None], self.means.mean[take] - self.control, 0.0)
        return effect, np.where(known[:, None], self.means.mc_variance[take], 0.0), known


@dataclass(frozen=True)
class Variate:
    """One term of the estimate: a predictor, debiased by its neighbours' residuals or raw. predictor None: no change."""

    predictor: Predictor | None
    form: str

    @property
    def name(self) -> str:
        return f"{self.predictor.name if self.predictor else 'no_change'}:{self.form}"

    def shift(self, queries: Queries, role: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the variate adds at weight 1 (R, G), its Monte-Carlo variance (R, G), and where it is defined (R,).

        Neighbours that the predictor did not predict: the weights of the others are scaled up, as long as they carry
        half of the weight of the query and the location is not additive; else the variate is 0 for the query.
        """
        if self.predictor is None:
            return -queries.base, np.zeros_like(queries.base), np.ones(len(queries), dtype=bool)
        effect, mc, known = self.predictor.effects_of(queries.names, role)
        if self.form == "raw":
            return np.where(known[:, None], effect - queries.base, 0.0), mc, known
        weights, usable = self._available(queries)
        known = known & usable
        shift = effect - mix(weights, self.predictor.neighbours)
        noise = mc + mix(weights**2, self.predictor.neighbours_mc)
        return np.where(known[:, None], shift, 0.0), np.where(known[:, None], noise, 0.0), known

    def _available(self, queries: Queries) -> tuple[np.ndarray, np.ndarray]:
        known = self.predictor.known
        if known.all():
            return queries.weights, np.ones(len(queries), dtype=bool)
        weights = queries.weights * known
        share = np.abs(weights).sum(1) / np.maximum(np.abs(queries.weights).sum(1), 1e-300)
        additive = (queries.info["kind"] == "additive").to_numpy()
        usable = np.where(additive, share > 1 - 1e-9, share >= 0.5)
        total, wanted = weights.sum(1), queries.weights.sum(1)
        usable &= np.abs(total) > 1e-9
        scale = np.where(usable, wanted / np.where(usable, total, 1.0), 0.0)
        return weights * np.where(additive, 1.0, scale)[:, None], usable


@dataclass(frozen=True)
class Estimate:
    """Predicted effects of R queries x G genes: effect, variance of effect about the true effect (control apart), of it
    what cells and Monte-Carlo noise contribute (known), the Monte-Carlo noise alone, df (R,) of the rest, weight: total weight
    of predictors (R, G); strength: the part of the rest by which targets differ in strength (tau^2 is what remains); slope: what the
    prediction was multiplied with."""

    effect: np.ndarray
    variance: np.ndarray
    known: np.ndarray
    noise: np.ndarray
    df: np.ndarray
    weight: np.ndarray
    strength: np.ndarray | float = 0.0
    slope: np.ndarray | float = 1.0

    def without_strength(self) -> Estimate:
        """For the test of no effect, which takes the strength as known: with it, perturbations that might do nothing would rule out every
        call, and p of held-out control guides would not be uniform."""
        return replace(self, variance=self.variance - self.strength, strength=0.0)

    def total_df(self, extra: np.ndarray | float, level: float) -> np.ndarray:
        """Degrees of freedom (R, G) of the t with the standard deviation of variance + extra whose interval at `level` is that of the
        parts: tau^2 with the quantile of its df, what is known and `extra` with the normal one."""
        tau, total = self.variance - self.known, self.variance + extra
        share = np.divide(tau, total, out=np.zeros_like(total), where=total > 0)
        normal = ttest.quantile(level, variance.MAX_DF)
        cut = np.sqrt(normal**2 + share * (ttest.quantile(level, self.df)[:, None] ** 2 - normal**2))
        return ttest.df_of_quantile(level, cut)


@dataclass(frozen=True)
class Slopes:
    """What a prediction is multiplied with by its size, its square in units of the gene's typical sampling variance: log-linear between two
    points, flat beyond. all: (2,) for targets; left_out: (H, 2) without each fold of pseudo-targets."""

    log_size: tuple[float, float] = (0.0, 1.0)
    all: np.ndarray = field(default_factory=lambda: np.ones(2))
    left_out: np.ndarray | None = None

    def of(self, effect: np.ndarray, own: np.ndarray, fold: int | None = None) -> np.ndarray:
        """Factors (R, G) of effect (R, G), with own (G,)."""
        slopes = self.all if fold is None or self.left_out is None else self.left_out[fold]
        return np.interp(log_ratio(effect**2, own), self.log_size, slopes)


def log_ratio(values: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """log(values / unit), for values (R, G) of 0 or more and unit (G,) or (R, G); large where the unit is 0 and the value is not."""
    tiny = 1e-300
    return np.log(np.maximum(values, tiny) / np.maximum(unit, tiny))


@dataclass(frozen=True)
class Stretch:
    """A factor on tau^2 by its size, in units of the gene's typical sampling variance, log-linear between two points and flat beyond; and
    strength: what the square of the predicted effect counts beside it, since perturbations of one kind differ in strength."""

    log_size: tuple[float, float] = (0.0, 1.0)
    log_factor: tuple[float, float] = (0.0, 0.0)
    strength: float = 0.0

    def factor(self, tau2: np.ndarray, own: np.ndarray) -> np.ndarray:
        """Of tau2 (R, G), with own (G,); 1 where tau2 is 0."""
        return np.where(tau2 > 0, np.exp(np.interp(log_ratio(tau2, own), self.log_size, self.log_factor)), 1.0)


@dataclass(frozen=True)
class Model:
    """Everything learned from the pseudo-targets of one kind for one method. Arrays with H are without fold h.

    weights: of the variates; prior (G,), prior_left (H, G): mean square of standardised errors, moderated; local_scale,
    local_df: scaled F of local variances against the prior; df_prior: its own degrees of freedom; scale (G,),
    scale_left (H, G): what the errors' normal scores ask the variance to be multiplied with; own (G,): typical sampling variance of
    an observed mean; calibrated: whether pseudo-targets of this kind stand behind it; df_tail: largest degrees of freedom that the
    errors' tails allow; stretch: factor on tau^2 by its size, and variance by strength. The last two are one for all pseudo-targets, which
    tell them together. slopes: what the estimate is multiplied with.
    """

    variates: tuple[Variate, ...]
    weights: stack.Weights
    prior: np.ndarray
    prior_left: np.ndarray
    local_scale: float
    local_df: float
    df_prior: float
    scale: np.ndarray
    scale_left: np.ndarray
    own: np.ndarray
    calibrated: bool
    df_tail: float = variance.MAX_DF
    stretch: Stretch = Stretch()
    slopes: Slopes = Slopes()


@dataclass(frozen=True)
class Pseudo:
    """Pseudo-targets of one kind: queries, observed effects and sampling variance (K, G), their rows among the
    training perturbations, folds (K,)."""

    queries: Queries
    observed: np.ndarray
    sampling: np.ndarray
    at: np.ndarray
    folds: np.ndarray


def make_folds(names: pd.Index, seed: int, *labels: object) -> np.ndarray:
    """Groups of pseudo-targets for cross-fitting, balanced in size, from the sorted names."""
    n = len(names)
    count = max(1, min(MAX_FOLDS, n))
    order = np.argsort(names.to_numpy(dtype=str), kind="stable")
    folds = np.empty(n, dtype=int)
    folds[order] = rng(seed, "inference", "folds", *labels).permutation(np.arange(n) % count)
    return folds


def pseudo_targets(screen: Screen, locations: LocationSet, kind: str, seed: int) -> Pseudo:
    """Training perturbations of a kind that were located without their own cells."""
    info = locations.info
    chosen = (info["role"] == "pseudo") & (info["status"] == "located") & (info["kind"] == kind)
    names = [n for n in locations.queries[chosen.to_numpy()] if n in screen.effects.perturbations]
    queries = Queries.of(screen, locations.select(names))
    at = screen.effects.perturbations.get_indexer(queries.names)
    return Pseudo(queries, screen.effects.effect[at], screen.sampling[at], at, make_folds(queries.names, seed, kind))


def local_variance(screen: Screen, queries: Queries, variates: tuple[Variate, ...], weights: np.ndarray) -> np.ndarray:
    """Weighted variance (R, G) of the neighbours' residuals, unbiased where they have one variance; 0 for additive ones."""
    residual = screen.effects.effect
    local = queries.local
    for v, variate in enumerate(variates):
        if variate.form == "debiased" and weights[:, v].any():
            residual = residual - weights[:, v] * variate.predictor.neighbours
            if not variate.predictor.known.all():
                local = local * variate.predictor.known
    total = local.sum(1, keepdims=True)
    local = np.divide(local, total, out=np.zeros_like(local), where=total > 1e-9)
    spread = mix(local, residual**2) - mix(local, residual) ** 2
    bessel = 1.0 - (local**2).sum(1)
    usable = (queries.local_df > 0.1) & (bessel > 1e-6)
    return np.where(usable[:, None], np.maximum(spread, 0.0) / np.where(usable, bessel, 1.0)[:, None], 0.0)


def _groups(folds: np.ndarray | None, n: int) -> list[tuple[int | None, np.ndarray]]:
    if folds is None:
        return [(None, np.arange(n))]
    return [(int(h), np.flatnonzero(folds == h)) for h in np.unique(folds)]


def estimate(model: Model, screen: Screen, queries: Queries, role: str, folds: np.ndarray | None = None) -> Estimate:
    """The estimate for queries; with `folds` (pseudo-targets) each from what was learned without its own fold.

    Variance = scale tau^2 (1 + sum w^2) + gamma^2 theta^2 + a^2 sum w^2 s^2/n + Monte-Carlo variance, with a the weight that the
    neighbour mean keeps beside raw predictions (1 without them), times the slope. tau^2 is the prior (mean square of pseudo-targets'
    errors of the gene) and the neighbours' own variance, weighted by their degrees of freedom, times the share of the prior that cells
    and Monte-Carlo noise do not explain (not below 0: of a gene that only noise moves, the neighbours' variance is noise too);
    scale is that of the standardised errors. gamma^2 is the strength of the stretch.
    """
    effect, weight = queries.base.copy(), np.zeros_like(queries.base)
    noise, kept = np.zeros_like(queries.base), np.ones_like(queries.base)
    groups = _groups(folds, len(queries))
    for v, variate in enumerate(model.variates):
        if not model.weights.all[:, v].any() and not model.weights.left_out[..., v].any():
            continue
        shift, mc, known = variate.shift(queries, role)
        for h, rows in groups:
            lam = (model.weights.all if h is None else model.weights.left_out[h])[:, v]
            effect[rows] += lam * shift[rows]
            noise[rows] += lam**2 * mc[rows]
            weight[rows] += lam * known[rows, None]
            if variate.form == "raw":
                kept[rows] -= lam * known[rows, None]
    slope = np.empty_like(effect)
    for h, rows in groups:
        slope[rows] = model.slopes.of(effect[rows], model.own, h)
    effect, noise = slope * effect, slope**2 * noise
    sampling = (slope * kept) ** 2 * queries.sampling
    tau2 = np.empty_like(effect)
    for h, rows in groups:
        part = queries.rows(rows)
        lam = model.weights.all if h is None else model.weights.left_out[h]
        prior, scale = (model.prior, model.scale) if h is None else (model.prior_left[h], model.scale_left[h])
        found = local_variance(screen, part, model.variates, lam)
        df = np.where(found.any(1), part.local_df, 0.0)[:, None]
        total = variance.squeeze(found, df, model.local_scale * prior, model.local_df)
        share = np.divide(np.maximum(prior - model.own, 0.0), prior, out=np.zeros_like(prior), where=prior > 0)
        tau2[rows] = scale * share * total
    tau2 *= model.stretch.factor(tau2, model.own)
    strength = model.stretch.strength * effect**2
    out = tau2 * (1 + queries.sum_sq)[:, None] + strength + sampling + noise
    df = min(model.local_df, model.df_prior) + queries.local_df
    return Estimate(effect, out, sampling + noise, noise, np.minimum(df, model.df_tail), weight, strength, slope)


def _fold_means(values: np.ndarray, folds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over rows (G,), and without each fold (H, G)."""
    total = values.sum(0)
    left = np.array([(total - values[folds == h].sum(0)) / max((folds != h).sum(), 1) for h in range(folds.max() + 1)])
    return total / len(values), left


def _moderated(values: np.ndarray, folds: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Means of squares over pseudo-targets, moderated over genes: for targets (G,), without each fold (H, G), and d0."""
    mean, left = _fold_means(values, folds)
    df = max(len(values) - 1.0, 1.0)
    moderated, d0 = variance.moderate(mean, df)
    return moderated, np.array([variance.moderate(row, df)[0] for row in left]), d0


def fit_uncalibrated(screen: Screen, queries: Queries, variates: tuple[Variate, ...], weight: float) -> Model:
    """The model where no pseudo-targets of the kind exist: fixed weight, variance from the training perturbations' spread."""
    n_genes = len(screen.effects.genes)
    weights = stack.fixed(weight, n_genes, 1) if variates else stack.Weights(np.zeros((n_genes, 0)), np.zeros((1, n_genes, 0)), np.inf)
    spread = (screen.effects.effect**2).mean(0)
    prior, d0 = variance.moderate(spread, max(len(screen.effects.perturbations) - 1.0, 1.0))
    found = local_variance(screen, queries, variates, weights.all)
    ratio = np.divide(found, prior, out=np.zeros_like(found), where=prior > 0)
    scale, local_df = variance.fit_f(ratio, queries.local_df[:, None])
    ones = np.ones(n_genes)
    return Model(
        variates,
        weights,
        prior,
        prior[None],
        scale if scale > 0 else 1.0,
        local_df if scale > 0 else 1.0,
        d0 + len(screen.effects.perturbations),
        ones,
        ones[None],
        screen.sampling.mean(0),
        False,
    )


def fit(screen: Screen, pseudo: Pseudo, variates: tuple[Variate, ...], weight: float | None, level: float) -> Model:
    """Tune weights (None: on the pseudo-targets) and variances on the errors of the pseudo-targets of one kind."""
    queries, folds = pseudo.queries, pseudo.folds
    n_genes, n_folds = pseudo.observed.shape[1], int(folds.max()) + 1
    if weight is None:
        shifts = np.stack([v.shift(queries, "pseudo")[0] for v in variates]).astype(np.float32)
        weights = stack.tune(pseudo.observed - queries.base, shifts, folds)
    else:
        weights = stack.fixed(weight, n_genes, n_folds)
    ones, own = np.ones(n_genes), np.zeros(n_genes)
    flat = np.ones((n_folds, n_genes))
    draft = Model(variates, weights, ones, flat, 1.0, 1.0, 1.0, ones, flat, own, True)
    first = estimate(draft, screen, queries, "pseudo", folds)
    own = ((pseudo.sampling + first.known) / (1 + queries.sum_sq)[:, None]).mean(0)
    # Of a single method the estimate stays what its name says.
    free = weight is None and any(v.form == "raw" for v in variates)
    slopes = fit_slopes(pseudo.observed, first.effect, own, folds) if free else Slopes()
    draft = replace(draft, slopes=slopes, own=own)
    error = pseudo.observed - estimate(draft, screen, queries, "pseudo", folds).effect
    prior, left, df_prior = _moderated(error**2 / (1 + queries.sum_sq)[:, None], folds)

    found = np.empty_like(error)
    for h, rows in _groups(folds, len(queries)):
        found[rows] = local_variance(screen, queries.rows(rows), variates, weights.left_out[h])
    ratio = np.divide(found, prior, out=np.zeros_like(found), where=prior > 0)
    local_scale, local_df = variance.fit_f(ratio, queries.local_df[:, None])
    if local_scale <= 0:
        local_scale, local_df = 1.0, variance.MAX_DF
    df_prior = df_prior + len(queries) - 1.0
    model = Model(variates, weights, prior, left, local_scale, local_df, df_prior, ones, flat, own, True, slopes=slopes)
    scores = normal_scores(error, estimate(model, screen, queries, "pseudo", folds), pseudo.sampling)
    scale, scale_left, _ = _moderated(scores**2, folds)
    model = replace(model, scale=scale, scale_left=scale_left)
    found = estimate(model, screen, queries, "pseudo", folds)
    stretch, df_tail = fit_tails(error, found, (1 + queries.sum_sq)[:, None] * own, pseudo.sampling, level)
    return replace(model, stretch=stretch, df_tail=df_tail)


def fit_slopes(observed: np.ndarray, effect: np.ndarray, own: np.ndarray, folds: np.ndarray) -> Slopes:
    """Slopes of observed on predicted effects (K, G) of pseudo-targets, for small and large predictions; 1 unless they predict better.

    Few genes change and many do not: where a prediction is small it is mostly noise, where it is large it is shrunk for the noise that it
    has little of. Least squares, each gene relative to its sampling variance own (G,), with a ridge penalty towards 1 that weighs like one
    pseudo-target; used if the error of pseudo-targets whose fold was left out falls by more than a standard error.
    """
    size = log_ratio(effect**2, own)
    points = tuple(float(x) for x in np.quantile(size[:, own > 0], SLOPE_POINTS)) if (own > 0).any() else (0.0, 0.0)
    if not points[0] < points[1]:
        return Slopes()
    large = np.interp(size, points, (0.0, 1.0))
    weight = np.divide(1.0, own, out=np.zeros_like(own), where=own > 0)
    parts = np.stack([effect * (1 - large), effect * large])
    gram, cross = np.einsum("akg,bkg,g->kab", parts, parts, weight), np.einsum("akg,kg,g->ka", parts, observed, weight)
    penalty = np.trace(gram.mean(0)) / 2 * np.eye(2)

    def solve(rows: np.ndarray) -> np.ndarray:
        return np.maximum(np.linalg.solve(gram[rows].sum(0) + penalty, cross[rows].sum(0) + penalty.sum(0)), 0.0)

    left = np.array([solve(folds != h) for h in range(folds.max() + 1)])
    mine, one = left[folds], np.ones(2)
    saved = (one @ gram * one).sum(-1) - 2 * cross.sum(-1) - np.einsum("ka,kab,kb->k", mine, gram, mine) + 2 * (mine * cross).sum(-1)
    if saved.sum() <= saved.std(ddof=1) * np.sqrt(len(saved)):
        return Slopes()
    return Slopes(points, solve(np.ones(len(folds), dtype=bool)), left)


@dataclass(frozen=True)
class _Errors:
    """Pairs (N,) of pseudo-target (row `target`) and gene: squares of the error and of the predicted effect, tau^2 as modelled, log of its
    size, what is known with the observation's own sampling variance, and df."""

    square: np.ndarray
    effect: np.ndarray
    tau: np.ndarray
    size: np.ndarray
    known: np.ndarray
    target: np.ndarray
    df: np.ndarray

    @classmethod
    def at(cls, pairs: np.ndarray, error: np.ndarray, found: Estimate, own: np.ndarray, sampling: np.ndarray) -> _Errors:
        """At flat positions among the pairs (K, G), about TAIL_PAIRS of them."""
        pairs = pairs[:: max(1, len(pairs) // TAIL_PAIRS)]
        tau = found.variance - found.known
        square, effect, tau, own, known = (x.ravel()[pairs] for x in (error**2, found.effect**2, tau, own, found.known + sampling))
        target = pairs // error.shape[1]
        return cls(square, effect, tau, log_ratio(tau, own), known, target, found.df[target])

    def asked(self, level: float, tail: float) -> np.ndarray:
        """The variance beside the known one at which each pair's interval at `level` would just hold its error."""
        return (self.square - norm.ppf(0.5 + level / 2) ** 2 * self.known) / ttest.quantile(level, np.minimum(self.df, tail)) ** 2

    def given(self, stretch: Stretch) -> np.ndarray:
        """That variance by a stretch."""
        return np.exp(np.interp(self.size, stretch.log_size, stretch.log_factor)) * self.tau + stretch.strength * self.effect


def fit_tails(error: np.ndarray, found: Estimate, own: np.ndarray, sampling: np.ndarray, level: float) -> tuple[Stretch, float]:
    """Factor on tau^2 by its size, variance by size of the predicted effect, and largest degrees of freedom, with which t intervals hold
    their share of the pseudo-targets' errors: at `level`, of all genes and of those of strongest prediction, and in the tails (TAIL_LEVEL).
    More is held at `level`, with K pseudo-targets what t with K - 1 degrees of freedom has over the normal, and of all genes at least a
    standard error over pseudo-targets: how well targets are predicted differs from one to the next, of which the four or five measured
    combinations that some screens have say little.

    Errors have heavier tails than t (most perturbations leave a gene alone, some change it much): intervals of unit scale
    would be too wide at the usual levels, and p far below 1 - level too small; and what is least sure is often less sure than it
    seems. Perturbations of one kind differ in strength, so that errors grow with the effect. What is known and the observation's own
    sampling error are normal and have the normal quantile; only the pairs in which the latter weighs least tell about tau^2.
    """
    tau = found.variance - found.known
    share = np.divide(tau, found.variance + sampling, out=np.zeros_like(error), where=tau > 0)
    used = np.flatnonzero((share > 0) & (share >= np.quantile(share, 1 - TELLING)))
    if not len(used):
        return Stretch(), variance.MAX_DF
    telling = _Errors.at(used, error, found, own, sampling)
    strong = _Errors.at(np.flatnonzero(strongest(found.effect) & (tau > 0)), error, found, own, sampling)
    far = max(level, TAIL_LEVEL)
    few = 2 * np.log(ttest.quantile(level, np.array([max(len(error) - 1.0, 1.0)]))[0] / norm.ppf(0.5 + level / 2))
    for tail in TAILS:
        stretch = Stretch()
        # Either is fitted to what the other leaves; halfway between rounds, lest they swing.
        for n in range(ROUNDS):
            stretch = _by_size(telling, len(error), level, tail, few, stretch.strength)
            if not len(strong.square):
                break
            needed = (strong.asked(level, tail) - strong.given(replace(stretch, strength=0.0))) / strong.effect
            # They are few and vary by target: a shortfall within its standard error is none, where pseudo-targets are enough to tell.
            spread = _spread(needed <= stretch.strength, strong.target) if len(error) >= MIN_BY_SIZE else 0.0
            strength = max(_held(needed, level - spread), 0.0) * np.exp(few)
            stretch = replace(stretch, strength=strength if n == 0 else (strength + stretch.strength) / 2)
        if (telling.asked(far, tail) <= telling.given(stretch)).mean() >= far:
            break
    return stretch, tail


def _by_size(errors: _Errors, targets: int, level: float, tail: float, few: float, strength: float) -> Stretch:
    """Factors on tau^2 beside a variance by strength; few: log of the least by which they exceed what holds `level`."""
    far = max(level, TAIL_LEVEL)
    size, needed = errors.size, (errors.asked(level, tail) - strength * errors.effect) / errors.tau
    edge = np.quantile(size, 1 - LARGEST / TELLING)
    parts = [size <= edge, size > edge] if targets >= MIN_BY_SIZE else [np.ones_like(size, dtype=bool)] * 2
    points = tuple(float(np.median(size[part])) if part.any() else float(edge) for part in parts)
    logs = [np.log(max(_held(needed[part] if part.any() else needed, level), 1e-6)) for part in parts]
    needed = needed / np.exp(np.interp(size, points, logs))
    held = max(_held(needed, level), 1e-6)
    margin = _spread(needed <= held, errors.target)
    common = max(np.log(max(_held(needed, min(level + margin, far)), 1e-6)), np.log(held) + few)
    return Stretch(points, tuple(np.clip([value + common for value in logs], *np.log(FACTORS))), strength)


def _spread(inside: np.ndarray, target: np.ndarray) -> float:
    """Standard error of the share inside, over pseudo-targets, each with as many pairs."""
    off = np.bincount(target, weights=inside - inside.mean())
    count = np.count_nonzero(np.bincount(target))
    return float(np.sqrt((off**2).sum() * count / max(count - 1, 1)) / len(inside))


def _held(needed: np.ndarray, share: float) -> float:
    """The value at which a share of the pairs is held."""
    return float(np.quantile(needed, share, method="inverted_cdf"))


def normal_scores(error: np.ndarray, found: Estimate, sampling: np.ndarray) -> np.ndarray:
    """Errors of observed effects as normal deviates: t with its df, the observation's own sampling variance included."""
    sd = np.sqrt(found.variance + sampling)
    z = np.divide(error, sd, out=np.zeros_like(error), where=sd > 0)
    p = student.sf(np.abs(z), found.df[:, None])
    # Beyond 8 standard deviations the score is the error's size no more.
    return np.minimum(norm.isf(np.maximum(p, 1e-15)), 8.0)


def fit_kinds(
    screen: Screen, locations: LocationSet, pseudo: dict[str, Pseudo], variates: tuple[Variate, ...], config: InferenceConfig
) -> dict[str, Model]:
    """One model for each kind of query that occurs. A kind with fewer than 3 pseudo-targets borrows that of singles, uncalibrated."""
    fixed = {"one": 1.0, "zero": 0.0}.get(config.weight)
    out_of_fold = all(v.predictor is None or v.predictor.out_of_fold for v in variates)
    models: dict[str, Model] = {}
    for kind in sorted(set(locations.info["kind"]), reverse=True):  # single first
        of_kind = pseudo[kind]
        if len(of_kind.queries) >= MIN_PSEUDO and out_of_fold:
            models[kind] = fit(screen, of_kind, variates, fixed, config.level)
        elif "single" in models:
            models[kind] = replace(models["single"], calibrated=False)
        else:
            located = locations.select(locations.queries[(locations.info["kind"] == kind).to_numpy()])
            models[kind] = fit_uncalibrated(screen, Queries.of(screen, located), variates, 0.0 if fixed is None else fixed)
    return models
