"""Rule qc: filters of cells and perturbations, summary and on-target table."""

from dbdiffusion.config.parse import parse
from dbdiffusion.config.qc import QcConfig
from dbdiffusion.data.qc import write_qc
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    write_qc(
        counts=snakemake.input.counts,
        config=parse(QcConfig, snakemake.params.config["qc"]),
        cells=snakemake.output.cells,
        summary=snakemake.output.summary,
        on_target=snakemake.output.on_target,
    )
