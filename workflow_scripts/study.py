"""Rule study: the calibration study on simulated screens."""

from dbdiffusion.inference.study import run_study
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    run_study(snakemake.output.study, screens=snakemake.params.screens, workers=snakemake.threads, scratch=snakemake.params.scratch)
