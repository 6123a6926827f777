"""Rule enrichment: gene sets in which the clusters of a fold are enriched."""

from dbdiffusion.benchmark.enrichment import write_enrichment
from dbdiffusion.config.datasets import Dataset
from dbdiffusion.config.parse import parse
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    dataset = parse(Dataset, snakemake.params.dataset)
    write_enrichment(clusters=snakemake.input.clusters, sources=dataset.features, aliases=dataset.aliases, out=snakemake.output.enrichment)
