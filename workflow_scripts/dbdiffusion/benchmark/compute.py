"""What the run cost, from Snakemake's benchmark files and the records of trained models."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import pandas as pd

from dbdiffusion.runtime import contracts
from dbdiffusion.runtime.errors import UserError
from dbdiffusion.runtime.files import read_json

MIB_PER_GIB = 1024.0


def _jobs(rule: str, path: str | Path) -> pd.DataFrame:
    """Seconds and peak memory (GiB) of the jobs in one benchmark file; "-" and NA (jobs too short to be measured) are missing."""
    table = pd.read_csv(path, sep="\t", na_values=["-", "NA"])
    absent = {"s", "max_rss"} - set(table.columns)
    if absent:
        raise UserError(
            f"column(s) {sorted(absent)} missing; found {list(table.columns)}",
            where=str(path),
            fix="run the rule again: its benchmark file is not Snakemake's",
        )
    return pd.DataFrame({"rule": rule, "seconds": table["s"].astype(float), "memory": table["max_rss"].astype(float) / MIB_PER_GIB})


def write_compute(
    *,
    benchmarks: Mapping[str, Sequence[str | Path]],
    records: Mapping[str, Sequence[str | Path]],
    measured: Collection[str],
    out: str | Path,
) -> None:
    """Write contract `compute`: one row per rule.

    benchmarks: Snakemake benchmark files by rule (columns s, max_rss in MiB; rows are jobs); records: JSON records by rule, whose
    entries `device` and `gpu_memory_gib`, where present, say where that rule ran. Rules without records ran on the CPU. measured: the rules
    whose own GPU memory the records state; that of others (which take the device from the records of a training) is missing.
    """
    rows = []
    for rule in sorted(benchmarks):
        jobs = [_jobs(rule, path) for path in benchmarks[rule]]
        if not jobs:
            continue
        table = pd.concat(jobs)
        notes = [read_json(path) for path in records.get(rule, [])]
        devices = sorted({str(note["device"]) for note in notes if note.get("device")}) or ["cpu"]
        gpu = [float(note["gpu_memory_gib"]) for note in notes if note.get("gpu_memory_gib") is not None] if rule in measured else []
        peak = table["memory"].max()
        rows.append(
            (rule, len(table), table["seconds"].sum(), 0.0 if pd.isna(peak) else peak, max(gpu, default=float("nan")), ", ".join(devices))
        )
    columns = ["rule", "jobs", "seconds", "peak_memory", "gpu_memory", "device"]
    kinds = {"jobs": "int64", "seconds": float, "peak_memory": float, "gpu_memory": float}
    contracts.COMPUTE.write(pd.DataFrame(rows, columns=columns).astype(kinds), out)
