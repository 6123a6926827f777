"""Rule permute_labels: a copy of a screen in which no perturbation has any effect."""

from dbdiffusion.data.permute import write_permuted
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    write_permuted(snakemake.input.cells, int(snakemake.params.seed), snakemake.output.cells)
