# dbDiffusion: from a Perturb-seq count matrix to tested predictions of perturbations nobody measured.
from snakemake.utils import min_version

min_version("9.16")


configfile: "config.yaml"


report: "rules/report/workflow.rst"


pathvars:
    logs="results/logs",
    benchmarks="results/benchmarks",


include: "rules/common.smk"
include: "rules/data.smk"
include: "rules/annotations.smk"
include: "rules/embedding.smk"
include: "rules/vae.smk"
include: "rules/diffusion.smk"
include: "rules/generation.smk"
include: "rules/inference.smk"
include: "rules/benchmark.smk"
include: "rules/report.smk"


rule all:
    default_target: True
    input:
        tables(),
        figures(),


rule tables_only:
    input:
        tables(),


rule figures_only:
    input:
        figures(),


rule cells_only:
    input:
        generated_cells(),


rule calibration_study:
    input:
        "results/calibration/study.parquet",
        "results/calibration/study.png",
