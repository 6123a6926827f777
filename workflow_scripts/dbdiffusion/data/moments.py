"""Sums of expression per group of cells, computed once: means, variances and controls of every later stage come from here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from dbdiffusion.data.normalise import group_sums, open_cells
from dbdiffusion.data.sets import CONTROL
from dbdiffusion.data.splits import Splits
from dbdiffusion.runtime.errors import UserError, nearest
from dbdiffusion.runtime.files import atomic_path

LAYERS = ("sum", "sum_sq", "detected")
GROUP = ["perturbation", "half", "batch", "guide"]


def write_moments(cells: str | Path, splits: str | Path, out: str | Path, by_batch: bool = False) -> None:
    """Sums of ln(1 + CP10k), of its square and of detected cells per perturbation and half; the control by batch and guide too.

    cells: cells.h5ad; splits: splits.json, whose halves are used; out: .h5ad with one row per group; by_batch: perturbations by batch as
    well, so that their effects can be estimated within batches.
    A group's sums depend on its own cells only.
    """
    import anndata

    halves = Splits.read(splits)
    with open_cells(cells) as file:
        halves.check_cells(file.obs.index)
        groups, codes = _groups(file.obs, halves.halves, by_batch)
        sums = group_sums(file, codes, len(groups))
        batches = sorted(file.obs["batch"].unique())
        composition = _composition(codes, file.obs["batch"], len(groups), batches)
        genes = file.genes
    groups["n_cells"] = sums.n.astype(np.int64)
    table = anndata.AnnData(
        obs=groups,
        var=pd.DataFrame(index=genes),
        layers={layer: getattr(sums, layer) for layer in LAYERS},
        obsm={"batch_cells": composition},
        uns={"batches": np.array(batches, dtype=object)},
    )
    with atomic_path(out) as temporary:
        table.write_h5ad(temporary, compression="gzip")


def _groups(obs: pd.DataFrame, halves: np.ndarray, by_batch: bool) -> tuple[pd.DataFrame, np.ndarray]:
    """The groups (sorted) and each cell's group; batch and guide tell groups of control cells apart, others have them empty (their batch
    only without `by_batch`)."""
    control = (obs["perturbation"] == CONTROL).to_numpy()
    keys = pd.DataFrame(
        {
            "perturbation": obs["perturbation"].to_numpy(),
            "half": halves,
            "batch": np.where(control | by_batch, obs["batch"], ""),
            "guide": np.where(control, obs["guide"], ""),
        }
    )
    grouped = keys.groupby(GROUP, sort=True)
    groups = grouped.size().index.to_frame(index=False)
    groups.index = groups[GROUP].agg("|".join, axis=1)
    return groups, grouped.ngroup().to_numpy()


def _composition(codes: np.ndarray, batch: pd.Series, groups: int, batches: list[str]) -> np.ndarray:
    """(groups, batches) cells of each batch in each group."""
    at = pd.Index(batches).get_indexer(batch)
    return np.bincount(codes * len(batches) + at, minlength=groups * len(batches)).reshape(groups, len(batches))


def _mean_var(n: np.ndarray, total: np.ndarray, squares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means and unbiased variances from sums; n broadcasts over genes. Variance 0 where there are fewer than 2 cells."""
    mean = np.divide(total, n, out=np.zeros_like(total), where=n > 0)
    spread = np.maximum(squares - n * mean**2, 0.0)
    # Sums over n cells carry a relative error of up to n times the machine precision: below that it is rounding, not variance.
    spread[spread < 4 * np.finfo(np.float64).eps * n * squares] = 0.0
    return mean, np.divide(spread, n - 1, out=np.zeros_like(total), where=n > 1)


@dataclass(frozen=True)
class Moments:
    """Sums over groups of cells (R groups x G genes) of ln(1 + CP10k).

    groups: (R,) perturbation, half, batch, guide (the last two only of control rows; batch of all where `by_batch`) and n_cells; sum,
    sum_sq, detected: (R, G); batch_cell_counts: (R, B) cells per batch.
    """

    groups: pd.DataFrame
    genes: pd.Index
    batches: list[str]
    batch_cell_counts: np.ndarray
    sum: np.ndarray
    sum_sq: np.ndarray
    detected: np.ndarray

    @classmethod
    def read(cls, path: str | Path) -> Moments:
        """Read what write_moments wrote."""
        import anndata

        path = Path(path)
        if not path.exists():
            raise UserError("file not found", where=str(path), fix="run the rule that makes it")
        table = anndata.read_h5ad(path)
        groups = table.obs.astype(dict.fromkeys(GROUP, str))
        batches = [str(batch) for batch in table.uns["batches"]]
        layers = (np.asarray(table.layers[layer], dtype=np.float64) for layer in LAYERS)
        return cls(groups, pd.Index(table.var_names.astype(str)), batches, np.asarray(table.obsm["batch_cells"]), *layers)

    @property
    def perturbations(self) -> list[str]:
        """Measured perturbations, sorted, without the control."""
        return sorted(set(self.groups["perturbation"]) - {CONTROL})

    @property
    def control_guides(self) -> list[str]:
        """Guides of control cells, sorted ([""] where guides are unknown)."""
        return sorted(self.groups.loc[self.groups["perturbation"] == CONTROL, "guide"].unique())

    @cached_property
    def by_batch(self) -> bool:
        """Whether perturbations, too, have a row for each batch."""
        return bool((self.groups.loc[self.groups["perturbation"] != CONTROL, "batch"] != "").any())

    def rows(
        self,
        perturbation: str,
        half: str | None = None,
        *,
        guides: list[str] | None = None,
    ) -> np.ndarray:
        """Positions of a perturbation's groups; guides select among control rows only.

        Raises UserError when there is none.
        """
        keep = (self.groups["perturbation"] == perturbation).to_numpy()
        if not keep.any():
            fix = nearest(perturbation, self.groups["perturbation"].unique())
            raise UserError(f"perturbation {perturbation!r} has no cells", where="moments", fix=fix)
        if half is not None:
            keep = keep & (self.groups["half"] == half).to_numpy()
        if guides is not None:
            keep = keep & self.groups["guide"].isin(guides).to_numpy()
        if not keep.any():
            raise UserError(
                f"no cells of {perturbation!r} are left in half {half!r} with guides {guides}",
                where="moments",
                fix=f"its guides are {self.groups.loc[self.groups['perturbation'] == perturbation, 'guide'].unique().tolist()}",
            )
        return np.flatnonzero(keep)

    def _summary(self, rows: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
        n = int(self.groups["n_cells"].to_numpy()[rows].sum())
        mean, variance = _mean_var(np.array(float(n)), self.sum[rows].sum(axis=0), self.sum_sq[rows].sum(axis=0))
        return n, mean, variance

    def mean_var(self, perturbation: str, half: str | None = None) -> tuple[int, np.ndarray, np.ndarray]:
        """Cells, mean (G,) and variance between cells (G,) of a perturbation (or the control), in one half or both."""
        return self._summary(self.rows(perturbation, half))

    def control(self, half: str | None = None, guides: list[str] | None = None) -> tuple[int, np.ndarray, np.ndarray]:
        """Cells, mean (G,) and variance (G,) of control cells, of all or some guides."""
        return self._summary(self.rows(CONTROL, half, guides=guides))

    def control_by_batch(self, half: str | None = None, guides: list[str] | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Control cells (B,), means (B, G) and variances (B, G) by batch, in the order of `batches`; zeros where a batch has none."""
        return self._batches(self.rows(CONTROL, half, guides=guides))

    def perturbation_by_batch(self, perturbation: str, half: str | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same of a perturbation's cells; only where `by_batch`."""
        return self._batches(self.rows(perturbation, half))

    def _batches(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        member = self.batch_cell_counts[rows].T > 0
        n = self.batch_cell_counts[rows].sum(axis=0)
        # These groups lie in one batch each, so membership adds up their sums.
        mean, variance = _mean_var(n[:, None].astype(float), member @ self.sum[rows], member @ self.sum_sq[rows])
        return n, mean, variance

    def batch_cells(self, perturbation: str, half: str | None = None, guides: list[str] | None = None) -> np.ndarray:
        """(B,) cells of a perturbation (or the control) per batch, in the order of `batches`."""
        rows = self.rows(perturbation, half, guides=guides)
        return self.batch_cell_counts[rows].sum(axis=0)

    def detected_cells(self, perturbation: str, half: str | None = None) -> np.ndarray:
        """(G,) cells of a perturbation in which a gene is detected."""
        return self.detected[self.rows(perturbation, half)].sum(axis=0)
