"""Rule figure_location_quality."""

from dbdiffusion.figures.location_quality import draw_location_quality
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    draw_location_quality(
        tables=list(snakemake.input.tables),
        png=snakemake.output.png,
        pdf=snakemake.output.pdf,
        bootstrap=snakemake.params.config["benchmark"]["bootstrap"],
    )
