"""Rule try_guidance: errors of one cross-fit model's pseudo-targets at every guidance strength."""

from dbdiffusion.config.generator import GenerationConfig
from dbdiffusion.config.parse import parse
from dbdiffusion.generative.tuning import write_trial
from dbdiffusion.runtime.device import set_threads
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    set_threads(snakemake.threads)
    write_trial(
        embedding=snakemake.input.embedding,
        effects=snakemake.input.effects,
        vae=snakemake.input.vae,
        vae_record=snakemake.input.vae_record,
        diffusion=snakemake.input.diffusion,
        diffusion_record=snakemake.input.diffusion_record,
        config=parse(GenerationConfig, snakemake.params.config["generation"]),
        device=snakemake.params.device,
        seed=int(snakemake.wildcards.seed),
        out=snakemake.output.trial,
    )
