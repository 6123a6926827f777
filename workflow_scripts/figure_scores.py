"""Rule figure_scores."""

from dbdiffusion.figures.scores import draw_scores
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    draw_scores(
        scores=snakemake.input.scores,
        png=snakemake.output.png,
        pdf=snakemake.output.pdf,
        bootstrap=snakemake.params.config["benchmark"]["bootstrap"],
    )
