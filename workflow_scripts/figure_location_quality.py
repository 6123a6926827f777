"""Rule figure_location_quality."""

from dbdiffusion.figures.location_quality import draw_location_quality
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    draw_location_quality(
        table=snakemake.input.table,
        png=snakemake.output.png,
        pdf=snakemake.output.pdf,
        bootstrap=snakemake.params.config["benchmark"]["bootstrap"],
        level=snakemake.params.config["location"]["coverage"],
    )
