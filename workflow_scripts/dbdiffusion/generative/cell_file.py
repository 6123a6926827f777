"""The file of generated cells."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from dbdiffusion.runtime.contracts import LOG_UNIT
from dbdiffusion.runtime.files import atomic_path


def write_cells(
    blocks: list[np.ndarray], names: pd.Index, roles: np.ndarray, crossfits: list[str] | list[np.ndarray], genes: pd.Index, path: str | Path
) -> None:
    """Write cells (n_i, G) of each perturbation i as one h5ad; crossfits: the model of each block or of each of its cells."""
    sizes = [len(block) for block in blocks]
    number = np.concatenate([np.arange(n) for n in sizes])
    label = np.repeat(np.asarray(names, dtype=object), sizes)
    obs = pd.DataFrame(
        {
            "perturbation": pd.Categorical(label),
            "role": pd.Categorical(np.repeat(np.asarray(roles, dtype=object), sizes)),
            "crossfit": pd.Categorical(
                np.concatenate([np.broadcast_to(np.asarray(c, dtype=object), n) for c, n in zip(crossfits, sizes, strict=True)])
            ),
        },
        index=pd.Index([f"{name}:{i}" for name, i in zip(label, number, strict=True)], name="cell"),
    )
    made = ad.AnnData(np.concatenate(blocks).astype(np.float32), obs=obs, var=pd.DataFrame(index=pd.Index(genes.astype(str), name="gene")))
    made.uns["units"] = LOG_UNIT
    with atomic_path(path) as temporary:
        made.write_h5ad(temporary, compression="gzip")
