"""Rule figure_location: where held-out targets were located and where they truly are."""

from dbdiffusion.data.splits import Splits
from dbdiffusion.figures.location import draw_location
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    draw_location(
        embedding=snakemake.input.embedding,
        effects=snakemake.input.effects,
        moments=snakemake.input.moments,
        locations=snakemake.input.locations,
        clusters=snakemake.input.clusters,
        targets=Splits.read(snakemake.input.splits).targets(snakemake.wildcards.fold),
        png=snakemake.output.png,
        pdf=snakemake.output.pdf,
        scale=snakemake.params.config["embedding"]["scale"],
    )
