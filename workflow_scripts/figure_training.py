"""Rule figure_training."""

from dbdiffusion.figures.training import draw_training
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    draw_training(
        vae=list(snakemake.input.vae), diffusion=list(snakemake.input.diffusion), png=snakemake.output.png, pdf=snakemake.output.pdf
    )
