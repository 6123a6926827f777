"""Rule figure_study."""

from dbdiffusion.figures.study import draw_study
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    draw_study(study=snakemake.input.study, png=snakemake.output.png, pdf=snakemake.output.pdf)
