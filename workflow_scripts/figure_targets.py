"""Rule figure_targets: predictions for targets that nobody measured."""

from dbdiffusion.data.splits import ALL, Splits
from dbdiffusion.figures.intervals import draw_targets
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    draw_targets(
        de=snakemake.input.de,
        targets=Splits.read(snakemake.input.splits).targets(ALL),
        png=snakemake.output.png,
        pdf=snakemake.output.pdf,
        method=snakemake.params.method,
        level=snakemake.params.config["inference"]["level"],
    )
