"""Rule embedding: perturbation embedding of one cross-fit model, with its located pseudo-targets and targets."""

from dbdiffusion.config.embedding import EmbeddingConfig
from dbdiffusion.config.parse import parse
from dbdiffusion.perturbations.embedding import write_embedding
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    write_embedding(
        effects=snakemake.input.effects,
        splits=snakemake.input.splits,
        locations=snakemake.input.locations,
        fold=snakemake.wildcards.fold,
        crossfit=snakemake.wildcards.crossfit,
        config=parse(EmbeddingConfig, snakemake.params.config["embedding"]),
        out=snakemake.output.embedding,
    )
