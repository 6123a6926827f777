"""Rule baselines: simple predictors in the layout of every generator."""

from dbdiffusion.benchmark.baselines import write_baselines
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    write_baselines(
        effects=snakemake.input.effects,
        locations=snakemake.input.locations,
        splits=snakemake.input.splits,
        gene_features=snakemake.input.gene_features,
        fold=snakemake.wildcards.fold,
        names=list(snakemake.params.names),
        seed=int(snakemake.wildcards.seed),
        outputs=dict(zip(snakemake.params.names, snakemake.output, strict=True)),
    )
