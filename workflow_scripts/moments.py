"""Rule moments: sums per perturbation, half, batch and control guide in one pass over the counts."""

from dbdiffusion.data.moments import write_moments
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    by_batch = snakemake.params.contexts == "meta"
    write_moments(snakemake.input.cells, snakemake.input.splits, snakemake.output.moments, by_batch)
