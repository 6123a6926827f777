"""Rule figure_enrichment."""

from dbdiffusion.figures.enrichment import draw_enrichment
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    draw_enrichment(enrichment=snakemake.input.enrichment, png=snakemake.output.png, pdf=snakemake.output.pdf)
