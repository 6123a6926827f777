"""Rule figure_predicted_observed: the held-out targets of strongest effect."""

from dbdiffusion.benchmark.targets import strongest_targets
from dbdiffusion.figures.predicted_observed import draw_predicted_observed
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    source = {"moments": snakemake.input.moments, "splits": snakemake.input.splits}
    draw_predicted_observed(
        de=snakemake.input.de,
        moments=snakemake.input.moments,
        targets=strongest_targets(**source, folds=snakemake.params.folds),
        most=snakemake.params.config["benchmark"]["figure_targets"],
        png=snakemake.output.png,
        pdf=snakemake.output.pdf,
        method=snakemake.params.method,
    )
