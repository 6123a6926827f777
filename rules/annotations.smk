# Public gene annotations, made when a feature source names one: results/annotations/go_bp.gmt and the like.
import re

from dbdiffusion.perturbations.annotations import files_of, read_annotations

ANNOTATION_TABLE = Path(workflow.basedir) / "resources" / "annotations.tsv"

try:
    ANNOTATIONS = read_annotations(ANNOTATION_TABLE)
except UserError as error:
    raise WorkflowError(str(error)) from None


localrules:
    download_annotation,


rule download_annotation:
    input:
        table=ancient(ANNOTATION_TABLE),
    output:
        "results/downloads/annotations/{file}",
    log:
        "<logs>/download/annotations/{file}.log",
    benchmark:
        "<benchmarks>/download/annotations/{file}.tsv"
    wildcard_constraints:
        file=names_or_none([re.escape(name) for name in files_of(ANNOTATIONS.values())]),
    retries: 3
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=minutes(60),
    params:
        # Kept when the file is removed: a later download must meet the recorded checksum.
        record="results/downloads/checksums/{file}.json",
        code=code("download_annotation.py"),
    script:
        "../workflow_scripts/download_annotation.py"


rule convert_annotation:
    input:
        files=lambda wildcards: [
            f"results/downloads/annotations/{file}" for file in ANNOTATIONS[wildcards.annotation].files
        ],
        table=ancient(ANNOTATION_TABLE),
    output:
        "results/annotations/{annotation}",
    log:
        "<logs>/annotations/{annotation}.log",
    benchmark:
        "<benchmarks>/annotations/{annotation}.tsv"
    wildcard_constraints:
        annotation=names_or_none([re.escape(name) for name in ANNOTATIONS]),
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=memory(4000),
        runtime=minutes(30),
    params:
        code=code("convert_annotation.py"),
    script:
        "../workflow_scripts/convert_annotation.py"
