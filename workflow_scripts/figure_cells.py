"""Rule figure_cells: real and generated cells of the fold's strongest held-out targets."""

from dbdiffusion.benchmark.targets import strongest_targets
from dbdiffusion.figures.cells import draw_cells
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    source = {"moments": snakemake.input.moments, "splits": snakemake.input.splits}
    draw_cells(
        cells=snakemake.input.cells,
        generated=snakemake.input.generated,
        locations=snakemake.input.locations,
        targets=strongest_targets(**source, folds=[snakemake.wildcards.fold]),
        most=snakemake.params.config["benchmark"]["figure_targets"],
        png=snakemake.output.png,
        pdf=snakemake.output.pdf,
    )
