"""Rule figure_cell_quality."""

from dbdiffusion.figures.cell_quality import draw_cell_quality
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    draw_cell_quality(quality=snakemake.input.quality, png=snakemake.output.png, pdf=snakemake.output.pdf)
