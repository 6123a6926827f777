"""Rule locate: gene features, clusters, and the place of every target among the measured perturbations."""

from dbdiffusion.config.datasets import Dataset
from dbdiffusion.config.embedding import ClustersConfig, LocationConfig
from dbdiffusion.config.parse import parse
from dbdiffusion.perturbations.locate import write_locations
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    dataset = parse(Dataset, snakemake.params.dataset)
    write_locations(
        cells=snakemake.input.cells,
        splits=snakemake.input.splits,
        effects=snakemake.input.effects,
        fold=snakemake.wildcards.fold,
        features=dataset.features,
        location=parse(LocationConfig, snakemake.params.config["location"]),
        clusters=parse(ClustersConfig, snakemake.params.config["clusters"]),
        seed=int(snakemake.wildcards.seed),
        locations=snakemake.output.locations,
        out_clusters=snakemake.output.clusters,
        gene_features=snakemake.output.gene_features,
        gene_names=snakemake.output.gene_names,
        aliases=dataset.aliases,
    )
