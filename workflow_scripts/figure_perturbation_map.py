"""Rule figure_perturbation_map."""

from dbdiffusion.figures.perturbation_map import draw_perturbation_map
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    draw_perturbation_map(clusters=snakemake.input.clusters, png=snakemake.output.png, pdf=snakemake.output.pdf)
