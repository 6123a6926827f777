"""Combinations of perturbations as sums of their parts: A+B is A's effect plus B's effect, each measured or located."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dbdiffusion.data.sets import CONTROL, LocationSet
from dbdiffusion.data.splits import parts
from dbdiffusion.perturbations.locators import Known, Placed, Ranked, place


@dataclass(frozen=True)
class Additivity:
    """Measured combinations that their measured parts' sum came closer to than the training mean did: wins of n."""

    wins: int
    n: int

    @property
    def confidence(self) -> float:
        """Share of wins, shrunk by one success and one failure."""
        return (self.wins + 1) / (self.n + 2)

    @classmethod
    def measure(cls, effects: Mapping[str, np.ndarray]) -> Additivity:
        """From scaled effects (G,) of training perturbations by name."""
        singles = {name: effect for name, effect in effects.items() if len(parts(name)) == 1}
        doubles = [name for name in effects if len(parts(name)) > 1 and all(part in singles for part in parts(name))]
        if not doubles:
            return cls(0, 0)
        mean = np.mean(list(effects.values()), axis=0)
        sums = {name: np.sum([singles[part] for part in parts(name)], axis=0) for name in doubles}
        return cls(sum(_distance(effects[n], sums[n]) < _distance(effects[n], mean) for n in doubles), len(doubles))


def _distance(left: np.ndarray, right: np.ndarray) -> float:
    return float(((left - right) ** 2).sum())


def locate_all(
    queries: Sequence[str],
    roles: Sequence[str],
    known: Known,
    ranking: Sequence[Ranked],
    measured_parts: Sequence[str],
    additivity: Additivity,
    neighbours: pd.Index,
) -> LocationSet:
    """Places of singles and combinations over `neighbours` (perturbations) and the control.

    A single has the weights of its locator. A combination of m parts has the sum of its parts' weights - 1 on the part itself
    where it is among `measured_parts`, the located weights otherwise - and 1 - m on the control, so that rows sum to 1 and
    the located effect is the sum of the parts' effects. Confidence of a combination: the least of its located parts', times
    the share of measured combinations that are additive. It is not locatable when one of its parts is not.
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
        located = [row_of[gene] for gene in genes if gene not in own]
        reason = _reason(placed, wanted, located, single)
        if not reason:
            for gene in own:
                weights[row, columns.get_loc(gene)] += 1.0
            weights[row, at] += placed.weights[located].sum(axis=0)
            weights[row, -1] += 1.0 - len(genes)
        records.append(_record(query, role, single, len(own), placed, located, reason, weights[row], additivity))
    info = pd.DataFrame(records, columns=["query", *LocationSet.INFO]).set_index("query")
    return LocationSet(pd.Index(list(queries)), columns, weights, info)


def _reason(placed: Placed, wanted: Sequence[str], located: Sequence[int], single: bool) -> str:
    lost = [number for number in located if placed.reasons[number]]
    if not lost:
        return ""
    return placed.reasons[lost[0]] if single else f"part {wanted[lost[0]]}: {placed.reasons[lost[0]]}"


def _record(
    query: str,
    role: str,
    single: bool,
    parts_measured: int,
    placed: Placed,
    located: Sequence[int],
    reason: str,
    weights: np.ndarray,
    additivity: Additivity,
) -> dict[str, object]:
    confidence = min((float(placed.confidence[number]) for number in located), default=1.0)
    labels = sorted({placed.labels[number] for number in located} - {""})
    return {
        "query": query,
        "role": role,
        "k_eff": 0.0 if reason else float(1.0 / (weights**2).sum()),
        "confidence": 0.0 if reason else confidence if single else confidence * additivity.confidence,
        "kind": "single" if single else "additive",
        "parts_measured": parts_measured,
        "status": "not_locatable" if reason else "located",
        "reason": reason,
        "locator": "; ".join(labels) if single else "; ".join(["additive", *labels]),
    }
