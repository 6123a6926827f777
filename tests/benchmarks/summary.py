"""Print what came out of a finished run: scores beside ceilings, coverage, calls.

    PYTHONPATH=workflow_scripts python tests/benchmarks/summary.py simulated papalexi norman

Scores are means over held-out targets that the default prediction (`stacked`) could place, the same targets for every method.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from dbdiffusion.runtime import contracts

METRICS = ("pearson_delta", "pearson_delta_perturbed", "mse", "discrimination", "de_average_precision", "energy_distance")
COLUMNS = ["check", "method", "stratum", "level", "value", "n", "low", "high"]
RAW = ("control", "training_mean", "neighbour_mean", "ridge", "linear", "dbdiffusion")


def scores(folder: Path) -> pd.DataFrame:
    """Rows: methods, the replicate last; columns: metrics on all genes."""
    table = contracts.SCORES.read(folder / "scores.parquet")
    table = table[(table["genes"] == "all") & table["metric"].isin(METRICS)].astype({"method": str, "metric": str, "target": str})
    placed = table[(table["method"] == "stacked") & (table["metric"] == "mse") & table["value"].notna()]["target"]
    table = table[table["target"].isin(placed)]
    means = table.groupby(["method", "debiased", "metric"])["value"].mean().unstack("metric")
    rows = [(method, False) for method in RAW] + [("dbdiffusion", True), ("stacked", True), ("replicate", False)]
    out = means.loc[[row for row in rows if row in means.index], [m for m in METRICS if m in means]]
    out.index = [f"{method}{' debiased' if debiased else ''}" for method, debiased in out.index]
    out.attrs["targets"] = len(placed)
    return out


def main(names: list[str]) -> None:
    pd.set_option("display.width", 160)
    for name in names:
        folder = Path("results") / name / "tables"
        table = scores(folder)
        print(f"\n## {name}: {table.attrs['targets']} held-out targets placed\n")
        print(table.round(3).to_string())
        checks = contracts.CALIBRATION.read(folder / "calibration.parquet")
        # `pooled`: the false share of all calls; `per target`: its mean over targets, where a target without calls counts as 0.
        checks = checks[checks["stratum"].isin(["per target", "pooled", "effect high", "prediction strongest 5 %", "smaller than uniform"])]
        chosen = [
            checks[checks["check"].isin(["fdr_truth"]) & (checks["level"] == 0.1)],
            checks[(checks["check"] == "coverage") & (checks["level"] == 0.95)],
            checks[checks["check"].isin(["fdr", "power"]) & (checks["level"] == 0.1) & checks["method"].isin(list(contracts.TESTS))],
            checks[(checks["check"] == "power_replicate") & (checks["level"] == 0.1)],
            checks[checks["check"].isin(["control_guides_ks", "doubling_calls", "permuted_labels_calls", "permuted_labels_ks"])],
        ]
        print("\n" + pd.concat(chosen)[COLUMNS].round(3).to_string(index=False))
        de = contracts.DE.read(folder / "de.parquet")
        de = de[de["method"] == "stacked"]
        print(
            f"\ncalls of stacked: {de['call'].value_counts().to_dict()}; targets: {de['target'].nunique()}; genes: {de['gene'].nunique()}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
