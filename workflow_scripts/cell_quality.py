"""Rule cell_quality: generated cells of one fold against measured ones, of seen and of held-out perturbations."""

from dbdiffusion.benchmark.cell_quality import write_cell_quality
from dbdiffusion.config.benchmark import BenchmarkConfig
from dbdiffusion.config.parse import parse
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    write_cell_quality(
        cells=snakemake.input.cells,
        splits=snakemake.input.splits,
        moments=snakemake.input.moments,
        effects=snakemake.input.effects,
        generated=snakemake.input.generated,
        means=snakemake.input.means,
        seen_generated=list(snakemake.input.seen_generated),
        seen_means=list(snakemake.input.seen_means),
        fold=snakemake.wildcards.fold,
        seed=int(snakemake.wildcards.seed),
        config=parse(BenchmarkConfig, snakemake.params.config["benchmark"]),
        out=snakemake.output.quality,
    )
