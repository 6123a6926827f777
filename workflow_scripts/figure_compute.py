"""Rule figure_compute."""

from dbdiffusion.figures.compute import draw_compute
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    draw_compute(compute=snakemake.input.compute, png=snakemake.output.png, pdf=snakemake.output.pdf)
