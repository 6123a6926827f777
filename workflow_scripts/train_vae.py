"""Rule train_vae: the autoencoder of one or more cross-fit models."""

from dbdiffusion.config.generator import VaeConfig
from dbdiffusion.config.parse import parse
from dbdiffusion.generative.vae import write_vaes
from dbdiffusion.runtime.device import set_threads
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    set_threads(snakemake.threads)
    write_vaes(
        cells=snakemake.input.cells,
        splits=snakemake.input.splits,
        effects=snakemake.input.effects,
        fold=snakemake.wildcards.fold,
        crossfit=snakemake.params.crossfit,
        config=parse(VaeConfig, snakemake.params.config["vae"]),
        device=snakemake.params.device,
        seed=int(snakemake.wildcards.seed),
        scratch=snakemake.params.scratch,
        weights=snakemake.output.weights,
        record=snakemake.output.record,
    )
