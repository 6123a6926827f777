"""Rule train_diffusion: the conditional latent diffusion model of one or more cross-fit models."""

from dbdiffusion.config.generator import DiffusionConfig
from dbdiffusion.config.parse import parse
from dbdiffusion.generative.diffusion import write_diffusions
from dbdiffusion.runtime.device import set_threads
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    set_threads(snakemake.threads)
    write_diffusions(
        cells=snakemake.input.cells,
        splits=snakemake.input.splits,
        effects=snakemake.input.effects,
        embedding=snakemake.input.embedding,
        vae=snakemake.input.vae,
        vae_record=snakemake.input.vae_record,
        fold=snakemake.wildcards.fold,
        crossfit=snakemake.params.crossfit,
        config=parse(DiffusionConfig, snakemake.params.config["diffusion"]),
        device=snakemake.params.device,
        seed=int(snakemake.wildcards.seed),
        scratch=snakemake.params.scratch,
        weights=snakemake.output.weights,
        record=snakemake.output.record,
    )
