"""Effect sizes of measured perturbations against batch-matched controls, and each fold's panel of genes and perturbations."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas as pd

from dbdiffusion.config.qc import PanelConfig
from dbdiffusion.data.moments import Moments
from dbdiffusion.data.sets import CONTROL, EffectSet
from dbdiffusion.data.splits import Splits, parts
from dbdiffusion.runtime.errors import UserError
from dbdiffusion.runtime.files import write_json

logger = logging.getLogger(__name__)

MIN_CONTROL_CELLS = 10  # control cells below which a batch borrows the pooled control
MIN_CELLS = 2  # cells below which there is no variance between cells
SCALE_FLOOR = 0.1  # share of the median scale below which a gene's scale is not believed


def control_weights(composition: np.ndarray, control_cells: np.ndarray) -> np.ndarray:
    """Coefficients (B,) of the control's batch means in the control matched to a batch composition; they sum to 1.

    composition: (B,) cells of the perturbation per batch; control_cells: (B,) control cells per batch. Batches with fewer
    than MIN_CONTROL_CELLS control cells use the pooled control, which is itself a mean of batch means weighted by cells.
    """
    share = composition / composition.sum()
    believed = control_cells >= MIN_CONTROL_CELLS
    return np.where(believed, share, 0.0) + share[~believed].sum() * control_cells / control_cells.sum()


class _Control:
    """The control in one half or both: pooled moments, and means and error variances by batch."""

    def __init__(self, moments: Moments, half: str | None, at: np.ndarray, guides: list[str] | None) -> None:
        self.n, mean, variance = moments.control(half, guides=guides)
        if self.n < MIN_CELLS:
            found = f"{self.n} control cell(s){f' in half {half}' if half else ''}, at least {MIN_CELLS} are needed"
            raise UserError(found, where="moments", fix="check the control labels under labels.control, and the QC limits")
        self.mean, self.variance = mean[at], variance[at]
        self.cells, means, variances = moments.control_by_batch(half, guides=guides)
        self.batch_means = means[:, at]
        # A variance from few cells is no estimate: such a batch takes the pooled one.
        spread = np.where((self.cells >= MIN_CONTROL_CELLS)[:, None], variances[:, at], self.variance)
        self.batch_errors = np.divide(spread, self.cells[:, None], out=np.zeros_like(spread), where=self.cells[:, None] > 0)
        self.batch_variances = spread

    def matched(self, composition: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean (G,) of the control on a batch composition, and its error variance (G,)."""
        weights = control_weights(composition, self.cells)
        return weights @ self.batch_means, weights**2 @ self.batch_errors


def within_contexts(
    cells: np.ndarray, means: np.ndarray, variances: np.ndarray, control: _Control, total: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One perturbation's effect within each context (batch or cell line), pooled: effect (G,), its standard error, and the share n / n_eff
    by which the pooled mean's sampling variance exceeds that of a plain mean of as many cells.

    cells (B,), means and variances (B, G) of the perturbation by context, total (G,) the variance over all its cells, which stands in where
    they do not vary within contexts (a gene seen only where there is one cell). d_b = x̄_b - c̄_b against the context's own control, of
    variance v_b = s²/n_b + s_c²/m_b with the variances s² within contexts pooled over them: weights that follow their own context's
    estimated variance would favour those where counts happen to be low. Pooled by inverse variance; the standard error is widened by
    the Birge ratio sqrt(max(1, Q / (S - 1))), Q = sum_b (d_b - d)² / v_b averaged over genes, where the S contexts disagree by more than
    chance. Cells of contexts with fewer than MIN_CONTROL_CELLS control cells are one context together, against the pooled control.
    """
    own = (control.cells >= MIN_CONTROL_CELLS) & (cells > 0)
    rest = (cells > 0) & ~own
    n, m = cells[own].astype(float), control.cells[own].astype(float)
    difference = means[own] - control.batch_means[own]
    if rest.any():
        n, m = np.append(n, cells[rest].sum()), np.append(m, control.n)
        difference = np.vstack([difference, np.average(means[rest], axis=0, weights=cells[rest]) - control.mean])
    freedom = np.maximum(cells - 1, 0)
    spread = (freedom @ variances) / freedom.sum() if freedom.sum() else control.variance
    spread = np.where(spread > 0, spread, total)
    share = control.cells * (control.cells >= MIN_CONTROL_CELLS)
    base = (share @ control.batch_variances) / share.sum() if share.sum() else control.variance
    error = np.maximum(spread / n[:, None] + base / m[:, None], 1e-300)
    weights = 1 / error / (1 / error).sum(axis=0)
    effect = (weights * difference).sum(axis=0)
    alive = (spread + base) > 0
    disagreement = ((difference - effect) ** 2 / error)[:, alive].sum(axis=0).mean() if alive.any() else 0.0
    birge = np.sqrt(max(1.0, disagreement / (len(n) - 1))) if len(n) > 1 else 1.0
    return effect, birge * np.sqrt(1 / (1 / error).sum(axis=0)), birge**2 * cells.sum() * (weights**2 / n[:, None]).sum(axis=0)


def estimate_effects(
    moments: Moments,
    perturbations: list[str] | pd.Index,
    genes: list[str] | pd.Index | None = None,
    half: str | None = None,
    control_half: str | None = None,
    *,
    control_guides: list[str] | None = None,
) -> EffectSet:
    """Effects of measured perturbations: mean of their cells less the control mean on the same batch composition.

    moments: of ln(1 + CP10k); perturbations: P labels; genes: G symbols (all when none); half: cells "A", "B" or both
    (none) of the perturbations, control_half the same for the control; control_guides: which control guides make up the
    control (all when none).

    effect_kj = x̄_kj - sum_b a_kb c̄_bj with a_kb from `control_weights`; se² = s²_kj / n_k + sum_b a²_kb s²_bj / n_b (cells as
    unit, batches fixed); mean = pooled control mean + effect, so that means of perturbations measured in different
    batches compare. Moments by batch (config datasets.*.contexts: meta) give effects within batches, pooled (`within_contexts`);
    variance is then that between cells within batches, times what the weights cost. Raises UserError for a perturbation with
    fewer than 2 cells and for a gene that was not measured.
    """
    genes = moments.genes if genes is None else pd.Index(genes)
    at = moments.genes.get_indexer(genes)
    if (at < 0).any():
        absent = genes[at < 0]
        raise UserError(
            f"{len(absent)} gene(s) are not measured, the first is {absent[0]!r}", where="moments", fix="use genes of cells.h5ad"
        )
    control = _Control(moments, control_half, at, control_guides)
    shape = (len(perturbations), len(genes))
    effect, se, variance, n_cells = np.zeros(shape), np.zeros(shape), np.zeros(shape), np.zeros(shape[0], dtype=np.int64)
    for row, name in enumerate(perturbations):
        n, mean, spread = moments.mean_var(name, half)
        if n < MIN_CELLS:
            found = f"{n} cell(s){f' in half {half}' if half else ''}, at least {MIN_CELLS} are needed for an effect"
            raise UserError(found, where=f"perturbation {name!r}", fix="raise qc.min_cells_per_perturbation, or drop the perturbation")
        n_cells[row] = n
        if moments.by_batch:
            cells, means, variances = moments.perturbation_by_batch(name, half)
            effect[row], se[row], excess = within_contexts(cells, means[:, at], variances[:, at], control, spread[at])
            freedom = np.maximum(cells - 1, 0)
            within = freedom @ variances[:, at] / freedom.sum() if freedom.sum() else spread[at]
            variance[row] = np.where(within > 0, within, spread[at]) * excess
        else:
            matched, error = control.matched(moments.batch_cells(name, half))
            effect[row], variance[row], se[row] = mean[at] - matched, spread[at], np.sqrt(spread[at] / n + error)
    mean = control.mean + effect
    return EffectSet(pd.Index(list(perturbations)), genes, mean, effect, se, variance, n_cells, control.mean, control.variance, control.n)


def gene_scale(se: np.ndarray) -> np.ndarray:
    """Scale (G,) of the noise of each gene: root mean square of its standard errors over perturbations.

    Floored at SCALE_FLOOR of the median scale, so that genes next to nobody expresses are not blown up.
    """
    scale = np.sqrt((se**2).mean(axis=0))
    typical = np.median(scale[scale > 0]) if (scale > 0).any() else 1.0
    return np.maximum(scale, SCALE_FLOOR * typical)


def write_effects(
    *, moments: str | Path, splits: str | Path, fold: str, config: PanelConfig, effects: str | Path, panel: str | Path
) -> None:
    """Effects of a fold's training perturbations on the fold's genes, and the record of how both were chosen.

    Training cells and control cells alone decide. effects: contract `effects`; panel: JSON with genes, training,
    dropped {perturbation: reason}, targets, measured_targets, unmeasured_genes (perturbed genes that are not among the
    measured ones).
    """
    sums, split = Moments.read(moments), Splits.read(splits)
    training, dropped = _with_enough_cells(sums, split.training(fold))
    detected = sums.genes[_detected(sums, training, config.min_detected_share)]
    if not len(detected):
        fix = "lower panel.min_detected_share"
        raise UserError(f"no gene is detected in {config.min_detected_share:.1%} of the training cells", where=str(moments), fix=fix)
    estimated = estimate_effects(sums, training, detected)
    strength = pd.Series(np.abs(estimated.effect).sum(axis=1), index=training)
    weak = strength.index[strength < config.min_effect]
    dropped |= {name: f"sum of absolute effects {strength[name]:.4g} is below panel.min_effect {config.min_effect:g}" for name in weak}
    kept = [name for name in training if name not in dropped]
    if len(kept) < 2:
        where = f"fold {fold}, {len(training)} training perturbation(s)"
        fix = "lower panel.min_effect or splits.folds, or use more data"
        raise UserError(f"{len(kept)} training perturbation(s) are left, at least 2 are needed", where=where, fix=fix)
    targets = split.targets(fold)
    perturbed = sorted({gene for name in [*kept, *targets] for gene in parts(name)})
    genes = select_genes(estimated.subset(kept), sums.genes, perturbed, config.n_genes)
    logger.info("fold %s: %d training perturbations, %d dropped, %d genes", fold, len(kept), len(dropped), len(genes))
    write_json(
        panel,
        {
            "fold": str(fold),
            "genes": list(genes),
            "training": kept,
            "dropped": dropped,
            "targets": targets,
            "measured_targets": [name for name in targets if name in set(split.measured)],
            "unmeasured_genes": [gene for gene in perturbed if gene not in sums.genes],
        },
    )
    estimate_effects(sums, kept, genes).write(effects)


def _with_enough_cells(moments: Moments, names: list[str]) -> tuple[list[str], dict[str, str]]:
    cells = {name: int(moments.groups["n_cells"].to_numpy()[moments.rows(name)].sum()) for name in names}
    dropped = {name: f"{n} cell(s), at least {MIN_CELLS} are needed" for name, n in cells.items() if n < MIN_CELLS}
    return [name for name in names if name not in dropped], dropped


def _detected(moments: Moments, training: list[str], share: float) -> np.ndarray:
    """(G,) genes detected in `share` of the training and control cells (and in one cell at least)."""
    names = [*training, CONTROL]
    cells = sum(int(moments.groups["n_cells"].to_numpy()[moments.rows(name)].sum()) for name in names)
    detected = np.sum([moments.detected_cells(name) for name in names], axis=0)
    return (detected >= share * cells) & (detected > 0)


def select_genes(effects: EffectSet, measured: pd.Index, perturbed: list[str], n_genes: int) -> pd.Index:
    """The panel: the `n_genes` genes of largest sum over perturbations of |effect| / gene_scale, and the perturbed genes.

    effects: of the training perturbations on the detected genes; measured: all genes in the order of cells.h5ad, which is
    the order of the panel; perturbed: symbols that are always kept where measured, detected or not.
    """
    score = (np.abs(effects.effect) / gene_scale(effects.se)).sum(axis=0)
    best = effects.genes[np.argsort(-score, kind="stable")[:n_genes]]
    return measured[measured.isin(best.union(pd.Index(perturbed)))]
