"""Rule tune_guidance: the guidance strengths of a fold from the trials of its cross-fit models."""

from dbdiffusion.generative.tuning import write_guidance
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    write_guidance(list(snakemake.input.trials), snakemake.output.guidance)
