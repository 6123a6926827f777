"""Rule location_quality: how well measured perturbations are located when they are treated as unmeasured."""

from dbdiffusion.benchmark.location import write_location_quality
from dbdiffusion.config.embedding import ClustersConfig, LocationConfig
from dbdiffusion.config.parse import parse
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    write_location_quality(
        moments=snakemake.input.moments,
        splits=snakemake.input.splits,
        effects=snakemake.input.effects,
        locations=snakemake.input.locations,
        clusters=snakemake.input.clusters,
        gene_features=snakemake.input.gene_features,
        fold=snakemake.wildcards.fold,
        seed=int(snakemake.wildcards.seed),
        location=parse(LocationConfig, snakemake.params.config["location"]),
        config=parse(ClustersConfig, snakemake.params.config["clusters"]),
        out=snakemake.output.quality,
    )
