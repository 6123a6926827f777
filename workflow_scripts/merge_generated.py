"""Rule merge_generated: pseudo-targets from the model that did not see them, targets averaged over the models."""

from dbdiffusion.generative.merge import write_merged
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    write_merged(
        generated=list(snakemake.input.generated),
        means=list(snakemake.input.means),
        out_generated=snakemake.output.generated,
        out_means=snakemake.output.means,
    )
