"""Rule figure_qc."""

from dbdiffusion.figures.qc import draw_qc
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    draw_qc(
        cells=snakemake.input.cells,
        summary=snakemake.input.summary,
        on_target=snakemake.input.on_target,
        png=snakemake.output.png,
        pdf=snakemake.output.pdf,
    )
