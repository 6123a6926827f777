"""Guides of cells from a cells x guides count matrix.

A guide is *present* in a cell at `min_counts` UMI or more. The cell's perturbation is what its present guides stand for:

- none present: `unassigned`;
- present guides of one perturbation (the same gene twice, or a gene beside non-targeting guides): that perturbation, if
  these guides together hold `min_share` of all guide UMI of the cell, else `unassigned`: the rest is too much to be ambient;
- present guides of several genes: the combination, if the guide table declares exactly these genes as the perturbation of
  some guide (`A+B`) and the share is reached; else `multi`, and the cell is dropped.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from dbdiffusion.config.datasets import GuideAssignment, Labels
from dbdiffusion.data.labels import JOIN, KEPT, LabelParser
from dbdiffusion.data.sets import CONTROL
from dbdiffusion.runtime.errors import UserError, nearest

ASSIGNED, UNASSIGNED, MULTI = "assigned", "unassigned", "multi"
GUIDE_JOIN = ";"
"""Joins the guides of a cell that carries several guides of one perturbation."""


def guide_targets(
    guides: Sequence[str], table: Mapping[str, str], labels: Labels, *, genes: Collection[str] = (), where: str
) -> list[tuple[str, ...]]:
    """The genes that each guide stands for, in the order of `guides`; an empty tuple for non-targeting guides.

    Raises UserError for guides that the table does not name, or whose perturbation cannot be understood.
    """
    absent = [guide for guide in guides if guide not in table]
    if absent:
        raise UserError(
            f"{len(absent)} of {len(guides)} guides of the count matrix are not in the guide table, e.g. {absent[:3]}",
            where=where,
            fix=f"add them (columns guide, perturbation); for {absent[0]!r}: {nearest(absent[0], table)}",
        )
    parser = LabelParser(labels, genes)
    targets = []
    for guide in guides:
        parsed = parser.parse(table[guide])
        if parsed.status != KEPT:
            raise UserError(
                f"guide {guide!r} has perturbation {table[guide]!r}, which is {parsed.status.replace('_', ' ')}",
                where=where,
                fix="give every guide a gene, a declared combination or a label of labels.control",
            )
        targets.append(parsed.genes)
    return targets


def assign_guides(
    counts: sp.csr_matrix, guides: Sequence[str], targets: Sequence[tuple[str, ...]], config: GuideAssignment
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Guide and perturbation of every cell.

    counts: (n_cells, n_guides) UMI; targets: genes of each guide as given by `guide_targets`.
    Returns a table of n_cells rows with columns guide (present guides of an assigned cell joined by `;`, else ""),
    perturbation (canonical label, "" unless assigned), status (assigned, unassigned, multi), share (of the present guides
    in the cell's guide UMI, 0 without any), and a report of counts.
    """
    counts = sp.csr_matrix(counts)
    n_cells = counts.shape[0]
    declared = {frozenset(genes) for genes in targets if len(genes) > 1}
    totals = np.asarray(counts.sum(axis=1), dtype=float).ravel()
    guide, perturbation = np.full(n_cells, "", dtype=object), np.full(n_cells, "", dtype=object)
    status, share = np.full(n_cells, UNASSIGNED, dtype=object), np.zeros(n_cells)
    present = counts >= config.min_counts if config.min_counts > 0 else counts > 0
    present = sp.csr_matrix(present)
    held = np.asarray(counts.multiply(present).sum(axis=1), dtype=float).ravel()
    np.divide(held, totals, out=share, where=totals > 0)
    no_guide = int((np.diff(present.indptr) == 0).sum())
    meaning: dict[tuple[int, ...], tuple[str, str]] = {}
    for cell in np.flatnonzero(np.diff(present.indptr)):
        at = tuple(sorted(present.indices[present.indptr[cell] : present.indptr[cell + 1]]))
        if at not in meaning:
            meaning[at] = _meaning(at, guides, targets, declared)
        name, label = meaning[at]
        if not label:
            status[cell] = MULTI
        elif share[cell] >= config.min_share:
            status[cell], guide[cell], perturbation[cell] = ASSIGNED, name, label
    report = {
        "cells": n_cells,
        "guides": len(guides),
        "assigned": int((status == ASSIGNED).sum()),
        "assigned_with_several_guides": int(sum(GUIDE_JOIN in name for name in guide)),
        "no_guide_present": no_guide,
        "share_too_small": int((status == UNASSIGNED).sum()) - no_guide,
        "multi": int((status == MULTI).sum()),
        "min_counts": config.min_counts,
        "min_share": config.min_share,
    }
    return pd.DataFrame({"guide": guide, "perturbation": perturbation, "status": status, "share": share}), report


def _meaning(
    at: tuple[int, ...], guides: Sequence[str], targets: Sequence[tuple[str, ...]], declared: set[frozenset[str]]
) -> tuple[str, str]:
    """Joined guide names and the perturbation of guides found together; an empty perturbation where there is no single one."""
    genes = frozenset(gene for i in at for gene in targets[i])
    if len(genes) > 1 and genes not in declared:
        return "", ""
    return GUIDE_JOIN.join(sorted(guides[i] for i in at)), JOIN.join(sorted(genes)) or CONTROL
