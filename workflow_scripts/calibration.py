"""Rule calibration: do the stated error rates hold on this dataset?"""

from dbdiffusion.config.inference import InferenceConfig
from dbdiffusion.config.parse import parse
from dbdiffusion.inference.calibration import write_calibration
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    methods, means = list(snakemake.params.methods), list(snakemake.input.means)
    write_calibration(
        effects=list(snakemake.input.effects),
        locations=list(snakemake.input.locations),
        means=[dict(zip(methods, means[i : i + len(methods)], strict=True)) for i in range(0, len(means), len(methods))],
        splits=snakemake.input.splits,
        moments=snakemake.input.moments,
        de=list(snakemake.input.de),
        config=parse(InferenceConfig, snakemake.params.config["inference"]),
        folds=list(snakemake.params.folds),
        seed=int(snakemake.params.seed),
        out=snakemake.output.calibration,
        **{name: snakemake.input.get(name) for name in ("permuted", "doubled", "truth")},
    )
