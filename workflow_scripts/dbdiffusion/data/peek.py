"""What a data file says of itself without being read: enough to refuse an impossible config before any job starts."""

from __future__ import annotations

from pathlib import Path

from dbdiffusion.config.datasets import FileDataset
from dbdiffusion.config.splits import SplitsConfig
from dbdiffusion.runtime.errors import UserError, nearest


def _text(values) -> list[str]:
    return [v.decode() if isinstance(v, bytes) else str(v) for v in values]


def check_h5ad(name: str, dataset: FileDataset, splits: SplitsConfig) -> None:
    """Check the columns of an .h5ad and that its perturbations suffice for the folds; other kinds are checked on ingest.

    Opens the file's cell table without its counts. Raises UserError naming the config key, the nearest column or the
    number of perturbations.
    """
    import h5py

    if dataset.kind != "h5ad" or not Path(dataset.path).is_file():
        return
    where = f"config key datasets.{name}.columns, file {dataset.path}"
    try:
        handle = h5py.File(dataset.path, "r")
    except OSError as error:
        fix = "fetch the file again: it may be truncated"
        raise UserError(f"cannot be opened as HDF5: {error}", where=dataset.path, fix=fix) from error
    with handle:
        if not isinstance(handle.get("obs"), h5py.Group):
            raise UserError("has no cell table `obs`", where=dataset.path, fix="write it with a current anndata (adata.write_h5ad)")
        columns = [c for c in _text(handle["obs"].keys()) if c != "__categories"]
        for key in ("perturbation", "guide", "batch", "library_size", "modality"):
            wanted = getattr(dataset.columns, key)
            if wanted is not None and wanted not in columns:
                raise UserError(f"{key}: there is no column {wanted!r}", where=where, fix=nearest(wanted, columns))
        label = handle["obs"][dataset.columns.perturbation]
        if not isinstance(label, h5py.Group) or "categories" not in label:
            return
        control = {c.casefold() for c in dataset.labels.control}
        found = [c for c in _text(label["categories"][:]) if c.casefold() not in control]
    needed = splits.folds if splits.scheme == "kfold" else 1
    if len(found) < needed:
        raise UserError(
            f"{needed} folds, but {dataset.path} has {len(found)} perturbation label(s)",
            where="config key splits.folds",
            fix=f"set splits.folds to at most {max(len(found), 2)}",
        )
