"""Rule figure_intervals: the held-out target of strongest effect."""

from dbdiffusion.benchmark.targets import strongest_targets
from dbdiffusion.figures.intervals import draw_intervals
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    source = {"moments": snakemake.input.moments, "splits": snakemake.input.splits}
    draw_intervals(
        de=snakemake.input.de,
        moments=snakemake.input.moments,
        target=strongest_targets(**source, folds=snakemake.params.folds),
        png=snakemake.output.png,
        pdf=snakemake.output.pdf,
        method=snakemake.params.method,
        level=snakemake.params.config["inference"]["level"],
    )
