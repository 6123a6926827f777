"""Rule score: every predictor of one fold against held-out cells, beside the replicate ceiling."""

from dbdiffusion.benchmark.scores import write_scores
from dbdiffusion.config.benchmark import BenchmarkConfig
from dbdiffusion.config.parse import parse
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    write_scores(
        splits=snakemake.input.splits,
        moments=snakemake.input.moments,
        cells=snakemake.input.cells,
        effects=snakemake.input.effects,
        locations=snakemake.input.locations,
        means={method: snakemake.input[f"means_{method}"] for method in snakemake.params.methods},
        de=snakemake.input.de,
        generated=snakemake.input.generated,
        fold=snakemake.wildcards.fold,
        seed=int(snakemake.wildcards.seed),
        config=parse(BenchmarkConfig, snakemake.params.config["benchmark"]),
        out=snakemake.output.scores,
    )
