"""What was measured for held-out targets, and the rows of the DE table that predict it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from dbdiffusion.data.moments import Moments
from dbdiffusion.perturbations.effects import estimate_effects
from dbdiffusion.runtime import contracts
from dbdiffusion.runtime.errors import UserError, nearest


def observe(moments: str | Path | None, targets: list[str], genes: list[str]) -> dict[str, pd.DataFrame]:
    """Measured change of each target against batch-matched control, in two halves of the cells.

    Returns, for every target that was measured, a frame indexed by gene with columns effect and se (half B, the truth that
    predictions are held against; ln(1 + CP10k)), replicate (the effect in half A) and n_cells (of half B). Targets that
    nobody measured are absent; `moments` may be None.
    """
    if moments is None:
        return {}
    table = Moments.read(moments)
    halves = table.groups.groupby("perturbation", observed=True)["half"].agg(set)
    present = [t for t in targets if halves.get(t, set()) >= {"A", "B"}]
    if not present:
        return {}
    half_b = estimate_effects(table, present, genes=genes, half="B", control_half="B")
    half_a = estimate_effects(table, present, genes=genes, half="A", control_half="A")
    return {
        t: pd.DataFrame(
            {"effect": half_b.effect[i], "se": half_b.se[i], "replicate": half_a.effect[i], "n_cells": int(half_b.n_cells[i])},
            index=pd.Index(half_b.genes.astype(str), name="gene"),
        )
        for i, t in enumerate(present)
    }


def predicted(de: str | Path, method: str, targets: list[str]) -> dict[str, pd.DataFrame]:
    """DE rows of `method` for each target, indexed by gene, from the first seed and fold that predict it.

    Raises UserError when the table has no row of the method. Targets without rows are absent.
    """
    table = contracts.DE.read(de)
    methods = sorted(table["method"].astype(str).unique())
    table = table[table["method"].astype(str) == method]
    if table.empty:
        raise UserError(f"no rows of method {method!r}", where=str(de), fix=nearest(method, methods))
    table = table.astype({"fold": str, "target": str, "gene": str, "call": str, "reason": str})
    out = {}
    for target, rows in table[table["target"].isin(targets)].groupby("target"):
        rows = rows.sort_values(["seed", "fold"], kind="stable")
        first = rows.iloc[0]
        out[target] = rows[(rows["seed"] == first["seed"]) & (rows["fold"] == first["fold"])].set_index("gene")
    return out


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson correlation over the positions where both are known; NaN when one of them does not vary."""
    good = np.isfinite(x) & np.isfinite(y)
    x, y = x[good], y[good]
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])
