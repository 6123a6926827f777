"""Rule simulate_screen: a screen with known truth, its gene annotations and the truth."""

from dbdiffusion.config.datasets import SimulateDataset
from dbdiffusion.config.parse import parse
from dbdiffusion.data.simulate import write_screen
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    write_screen(
        parse(SimulateDataset, snakemake.params.dataset),
        counts=snakemake.output.counts,
        annotations=snakemake.output.annotations,
        truth=snakemake.output.truth,
    )
