"""Rule generate: cells and means of every located perturbation from one cross-fit model."""

from dbdiffusion.config.generator import GenerationConfig
from dbdiffusion.config.parse import parse
from dbdiffusion.generative.generate import write_generated
from dbdiffusion.runtime.device import set_threads
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    set_threads(snakemake.threads)
    write_generated(
        embedding=snakemake.input.embedding,
        effects=snakemake.input.effects,
        vae=snakemake.input.vae,
        vae_record=snakemake.input.vae_record,
        diffusion=snakemake.input.diffusion,
        diffusion_record=snakemake.input.diffusion_record,
        config=parse(GenerationConfig, snakemake.params.config["generation"]),
        device=snakemake.params.device,
        seed=int(snakemake.wildcards.seed),
        generated=snakemake.output.generated,
        means=snakemake.output.means,
        guidance=snakemake.input.get("guidance") or None,
    )
