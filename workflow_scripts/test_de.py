"""Rule test_de: debiased estimates, intervals, tests and calls of one fold's targets, for every predictor."""

from dbdiffusion.config.inference import InferenceConfig
from dbdiffusion.config.parse import parse
from dbdiffusion.inference.table import write_de
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    write_de(
        effects=snakemake.input.effects,
        locations=snakemake.input.locations,
        means={method: snakemake.input[f"means_{method}"] for method in snakemake.params.methods},
        config=parse(InferenceConfig, snakemake.params.config["inference"]),
        fold=snakemake.wildcards.fold,
        seed=int(snakemake.wildcards.seed),
        out=snakemake.output.de,
    )
