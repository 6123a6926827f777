"""Rule figure_calibration."""

from dbdiffusion.figures.calibration import draw_calibration
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    draw_calibration(calibration=snakemake.input.calibration, png=snakemake.output.png, pdf=snakemake.output.pdf)
