"""Long tables of the contracts as matrices: perturbations x genes, and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from dbdiffusion.runtime import contracts

CONTROL = "control"


def _matrix(frame: pd.DataFrame, row: str, value: str, rows: pd.Index, genes: pd.Index) -> np.ndarray:
    """Long to wide for a complete table, whatever its row order."""
    out = np.full((len(rows), len(genes)), np.nan)
    out[rows.get_indexer(frame[row]), genes.get_indexer(frame["gene"])] = frame[value].to_numpy()
    return out


@dataclass(frozen=True)
class EffectSet:
    """Moments and effects of measured perturbations (P perturbations x G genes, control apart).

    mean, effect, se, variance: (P, G) in ln(1 + CP10k) (variance squared); n_cells: (P,);
    control_mean, control_variance: (G,); control_n: cells.
    """

    perturbations: pd.Index
    genes: pd.Index
    mean: np.ndarray
    effect: np.ndarray
    se: np.ndarray
    variance: np.ndarray
    n_cells: np.ndarray
    control_mean: np.ndarray
    control_variance: np.ndarray
    control_n: int

    def subset(self, perturbations: list[str] | pd.Index) -> EffectSet:
        """The same for some of the perturbations, in the order given."""
        at = self.perturbations.get_indexer(perturbations)
        if (at < 0).any():
            missing = [p for p, i in zip(perturbations, at, strict=True) if i < 0]
            raise KeyError(f"perturbations without effects: {missing[:5]}")
        return EffectSet(
            pd.Index(perturbations),
            self.genes,
            *(getattr(self, name)[at] for name in ("mean", "effect", "se", "variance", "n_cells")),
            self.control_mean,
            self.control_variance,
            self.control_n,
        )

    def to_frame(self) -> pd.DataFrame:
        """Rows of contract `effects`; the control has effect 0 and is the last perturbation."""
        names = self.perturbations.append(pd.Index([CONTROL]))
        zero = np.zeros((1, len(self.genes)))
        n = np.append(self.n_cells, self.control_n).astype(np.int64)

        def stack(values: np.ndarray, control: np.ndarray) -> np.ndarray:
            return np.vstack([values, np.atleast_2d(control)]).ravel()

        return pd.DataFrame(
            {
                "perturbation": np.repeat(names.to_numpy(dtype=object), len(self.genes)),
                "gene": np.tile(self.genes.to_numpy(dtype=object), len(names)),
                "mean": stack(self.mean, self.control_mean),
                "effect": stack(self.effect, zero),
                "se": stack(self.se, np.sqrt(self.control_variance / max(self.control_n, 1))),
                "variance": stack(self.variance, self.control_variance),
                "n_cells": np.repeat(n, len(self.genes)),
            }
        )

    def write(self, path: str | Path) -> None:
        contracts.EFFECTS.write(self.to_frame(), path)

    @classmethod
    def read(cls, path: str | Path) -> EffectSet:
        frame = contracts.EFFECTS.read(path)
        genes = pd.Index(frame["gene"].astype(str).unique())
        names = pd.Index(frame["perturbation"].astype(str).unique()).drop(CONTROL)
        everyone = names.append(pd.Index([CONTROL]))
        wide = {value: _matrix(frame, "perturbation", value, everyone, genes) for value in ("mean", "effect", "se", "variance", "n_cells")}
        n = wide["n_cells"][:, 0].astype(np.int64)
        return cls(
            names,
            genes,
            wide["mean"][:-1],
            wide["effect"][:-1],
            wide["se"][:-1],
            wide["variance"][:-1],
            n[:-1],
            wide["mean"][-1],
            wide["variance"][-1],
            int(n[-1]),
        )


@dataclass(frozen=True)
class MeanSet:
    """Predicted means (R rows x G genes): mean and mc_variance in ln(1 + CP10k) (squared); role of each row."""

    perturbations: pd.Index
    roles: np.ndarray
    genes: pd.Index
    mean: np.ndarray
    mc_variance: np.ndarray

    def rows(self, perturbations: list[str] | pd.Index) -> np.ndarray:
        """Row numbers of the perturbations; -1 where a perturbation was not predicted."""
        return self.perturbations.get_indexer(perturbations)

    def to_frame(self) -> pd.DataFrame:
        n = len(self.genes)
        return pd.DataFrame(
            {
                "perturbation": np.repeat(self.perturbations.to_numpy(dtype=object), n),
                "role": np.repeat(np.asarray(self.roles, dtype=object), n),
                "gene": np.tile(self.genes.to_numpy(dtype=object), len(self.perturbations)),
                "mean": np.asarray(self.mean, dtype=float).ravel(),
                "mc_variance": np.asarray(self.mc_variance, dtype=float).ravel(),
            }
        )

    def write(self, path: str | Path) -> None:
        contracts.MEANS.write(self.to_frame(), path)

    @classmethod
    def read(cls, path: str | Path) -> MeanSet:
        frame = contracts.MEANS.read(path)
        genes = pd.Index(frame["gene"].astype(str).unique())
        first = frame.drop_duplicates("perturbation")
        names = pd.Index(first["perturbation"].astype(str))
        return cls(
            names,
            first["role"].astype(str).to_numpy(),
            genes,
            _matrix(frame, "perturbation", "mean", names, genes),
            _matrix(frame, "perturbation", "mc_variance", names, genes),
        )


@dataclass(frozen=True)
class LocationSet:
    """Weights of located queries over training perturbations.

    queries: (R,); neighbours: (P,) training perturbations, `control` last; weights: (R, P), rows sum to 1
    (0 for a query that is not locatable); info: one row per query with role, k_eff, confidence, kind,
    parts_measured, status, reason, locator, indexed by query.
    """

    queries: pd.Index
    neighbours: pd.Index
    weights: np.ndarray
    info: pd.DataFrame = field(repr=False)

    INFO = ("role", "k_eff", "confidence", "kind", "parts_measured", "status", "reason", "locator")

    def select(self, queries: list[str] | pd.Index) -> LocationSet:
        """The same for some of the queries, in the order given."""
        at = self.queries.get_indexer(queries)
        if (at < 0).any():
            raise KeyError(f"queries without a location: {[q for q, i in zip(queries, at, strict=True) if i < 0][:5]}")
        return LocationSet(pd.Index(queries), self.neighbours, self.weights[at], self.info.loc[list(queries)])

    def to_frame(self, fit: str) -> pd.DataFrame:
        """Rows of contract `locations` for one fit."""
        info = self.info.loc[self.queries]
        rows, columns = np.nonzero(self.weights)
        empty = np.setdiff1d(np.arange(len(self.queries)), rows)
        row = np.concatenate([rows, empty]).astype(int)
        neighbour = np.concatenate([self.neighbours.to_numpy(dtype=object)[columns], np.full(len(empty), "", dtype=object)])
        weight = np.concatenate([self.weights[rows, columns], np.zeros(len(empty))])
        frame = info.iloc[row].reset_index(drop=True)
        frame.insert(0, "fit", fit)
        frame.insert(1, "query", self.queries.to_numpy(dtype=object)[row])
        frame["neighbour"], frame["weight"] = neighbour, weight
        return frame.sort_values(["query", "weight", "neighbour"], ascending=[True, False, True], ignore_index=True)

    @staticmethod
    def write(fits: dict[str, LocationSet], path: str | Path) -> None:
        contracts.LOCATIONS.write(pd.concat([s.to_frame(fit) for fit, s in fits.items()], ignore_index=True), path)

    @classmethod
    def read(cls, path: str | Path, fit: str, perturbations: pd.Index) -> LocationSet:
        """The locations of one fit, as weights over `perturbations` and the control."""
        frame = contracts.LOCATIONS.read(path)
        frame = frame[frame["fit"].astype(str) == fit]
        queries = pd.Index(frame["query"].astype(str).unique())
        neighbours = pd.Index(perturbations).append(pd.Index([CONTROL]))
        weights = np.zeros((len(queries), len(neighbours)))
        real = frame[frame["neighbour"].astype(str) != ""]
        at = neighbours.get_indexer(real["neighbour"].astype(str))
        if (at < 0).any():
            raise KeyError(f"{path}: neighbours that are no training perturbations: {set(real['neighbour'][at < 0])}")
        weights[queries.get_indexer(real["query"].astype(str)), at] = real["weight"]
        info = frame.drop_duplicates("query").set_index(frame.drop_duplicates("query")["query"].astype(str))[list(cls.INFO)]
        for column in ("role", "kind", "status", "reason", "locator"):
            info[column] = info[column].astype(str)
        return cls(queries, neighbours, weights, info)
