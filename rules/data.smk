# Counts in, clean cells, splits and moments out.


rule simulate_screen:
    output:
        counts="results/{dataset}/raw/counts.h5ad",
        annotations="results/{dataset}/raw/annotations.gmt",
        truth="results/{dataset}/raw/truth.parquet",
    log:
        "<logs>/{dataset}/simulate_screen.log",
    benchmark:
        "<benchmarks>/{dataset}/simulate_screen.tsv"
    wildcard_constraints:
        dataset=names_or_none(SIMULATED),
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=memory(2000),
        runtime=minutes(20),
    params:
        dataset=counts_block,
        code=code("simulate_screen.py"),
    script:
        "../workflow_scripts/simulate_screen.py"


localrules:
    download,


rule download:
    input:
        table=ancient(CATALOGUE),
    output:
        "results/downloads/{entry}",
    log:
        "<logs>/download/{entry}.log",
    benchmark:
        "<benchmarks>/download/{entry}.tsv"
    wildcard_constraints:
        entry=r"[^/]+\.(h5ad|h5mu|rds)",
    retries: 3
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=minutes(240),
    params:
        # Kept when the file is removed: a later download must meet the recorded checksum.
        record="results/downloads/checksums/{entry}.json",
        code=code("download.py"),
    script:
        "../workflow_scripts/download.py"


rule convert_seurat:
    input:
        object="results/downloads/{entry}.rds",
        script=SCRIPTS / "convert_seurat.R",
    output:
        directory("results/downloads/{entry}_10x_mtx"),
    log:
        "<logs>/download/{entry}_convert.log",
    benchmark:
        "<benchmarks>/download/{entry}_convert.tsv"
    wildcard_constraints:
        entry=r"[^/]+",
    conda:
        "../envs/seurat.yaml"
    threads: 1
    resources:
        mem_mb=memory(32000),
        runtime=minutes(120),
    shell:
        "Rscript {input.script} {input.object} {output} > {log} 2>&1"


rule ingest:
    input:
        unpack(source_of),
    output:
        counts="results/{dataset}/raw/counts.h5ad",
    log:
        "<logs>/{dataset}/ingest.log",
    benchmark:
        "<benchmarks>/{dataset}/ingest.tsv"
    wildcard_constraints:
        dataset=names_or_none([name for name in DATASETS if name not in SIMULATED]),
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=memory(3000, times_input=8),
        runtime=minutes(60),
    params:
        dataset=counts_block,
        code=code("ingest.py"),
    script:
        "../workflow_scripts/ingest.py"


rule qc:
    input:
        counts="results/{dataset}/raw/counts.h5ad",
    output:
        cells="results/{dataset}/qc/cells.h5ad",
        summary="results/{dataset}/qc/summary.json",
        on_target="results/{dataset}/qc/on_target.parquet",
    log:
        "<logs>/{dataset}/qc.log",
    benchmark:
        "<benchmarks>/{dataset}/qc.tsv"
    wildcard_constraints:
        dataset=names_or_none(DATASETS),
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=memory(3000, times_input=8),
        runtime=minutes(60),
    params:
        config=block("qc"),
        code=code("qc.py"),
    script:
        "../workflow_scripts/qc.py"


rule permute_labels:
    input:
        cells="results/{dataset}/qc/cells.h5ad",
    output:
        cells=f"results/{{dataset}}{PERMUTED}/qc/cells.h5ad",
    log:
        "<logs>/{dataset}/permute_labels.log",
    benchmark:
        "<benchmarks>/{dataset}/permute_labels.tsv"
    wildcard_constraints:
        dataset=names_or_none(DATASETS),
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=memory(3000, times_input=8),
        runtime=minutes(60),
    params:
        seed=SEEDS[0],
        code=code("permute_labels.py"),
    script:
        "../workflow_scripts/permute_labels.py"


rule splits:
    input:
        cells="results/{dataset}/qc/cells.h5ad",
    output:
        splits="results/{dataset}/seed{seed}/splits.json",
    log:
        "<logs>/{dataset}/seed{seed}/splits.log",
    benchmark:
        "<benchmarks>/{dataset}/seed{seed}/splits.tsv"
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=memory(2000),
        runtime=minutes(30),
    params:
        config=block("splits"),
        targets=CONFIG.run.targets,
        code=code("splits.py"),
    script:
        "../workflow_scripts/splits.py"


rule moments:
    input:
        cells="results/{dataset}/qc/cells.h5ad",
        splits="results/{dataset}/seed{seed}/splits.json",
    output:
        moments="results/{dataset}/seed{seed}/moments.h5ad",
    log:
        "<logs>/{dataset}/seed{seed}/moments.log",
    benchmark:
        "<benchmarks>/{dataset}/seed{seed}/moments.tsv"
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=memory(3000, times_input=8),
        runtime=minutes(60),
    params:
        contexts=lambda wildcards: dataset_of(wildcards).contexts,
        code=code("moments.py"),
    script:
        "../workflow_scripts/moments.py"
