"""Rule embedding: what one cross-fit model is conditioned on: own and located embeddings, gene features."""

from dbdiffusion.config.embedding import EmbeddingConfig
from dbdiffusion.config.parse import parse
from dbdiffusion.perturbations.conditions import write_embedding
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    write_embedding(
        effects=snakemake.input.effects,
        splits=snakemake.input.splits,
        locations=snakemake.input.locations,
        gene_features=snakemake.input.gene_features,
        fold=snakemake.wildcards.fold,
        crossfit=snakemake.wildcards.crossfit,
        config=parse(EmbeddingConfig, snakemake.params.config["embedding"]),
        out=snakemake.output.embedding,
    )
