"""Rule splits: outer folds, cross-fit folds and cell halves, the only place where a split is decided."""

from dbdiffusion.config.parse import parse
from dbdiffusion.config.splits import SplitsConfig
from dbdiffusion.data.splits import write_splits
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    write_splits(
        snakemake.input.cells,
        parse(SplitsConfig, snakemake.params.config["splits"]),
        list(snakemake.params.targets),
        int(snakemake.wildcards.seed),
        snakemake.output.splits,
    )
