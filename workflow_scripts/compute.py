"""Rule compute: what the run cost, from the benchmark files of its jobs."""

from dbdiffusion.benchmark.compute import write_compute
from dbdiffusion.runtime.log import stage_log


def listed(files: object) -> list[str]:
    return [files] if isinstance(files, str) else list(files)


with stage_log(snakemake.log[0]):
    write_compute(
        benchmarks={rule: listed(snakemake.input[rule]) for rule in snakemake.params.rules},
        records={
            "train_vae": listed(snakemake.input.vae_records),
            "train_diffusion": listed(snakemake.input.diffusion_records),
            # All other work of the networks is done where they are trained.
            **dict.fromkeys(("try_guidance", "generate", "permuted_labels", "doubled_cells"), listed(snakemake.input.diffusion_records)),
        },
        measured=("train_vae", "train_diffusion"),
        out=snakemake.output.compute,
    )
