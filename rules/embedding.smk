# Effect sizes, locations of unmeasured perturbations, embeddings. No held-out cell is read here.


rule effects:
    input:
        moments="results/{dataset}/seed{seed}/moments.h5ad",
        splits="results/{dataset}/seed{seed}/splits.json",
    output:
        effects="results/{dataset}/seed{seed}/fold{fold}/effects.parquet",
        panel="results/{dataset}/seed{seed}/fold{fold}/panel.json",
    log:
        "<logs>/{dataset}/seed{seed}/fold{fold}/effects.log",
    benchmark:
        "<benchmarks>/{dataset}/seed{seed}/fold{fold}/effects.tsv"
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=memory(3000),
        runtime=minutes(30),
    params:
        config=panel_block,
        code=code("effects.py"),
    script:
        "../workflow_scripts/effects.py"


rule locate:
    input:
        cells="results/{dataset}/qc/cells.h5ad",
        splits="results/{dataset}/seed{seed}/splits.json",
        effects="results/{dataset}/seed{seed}/fold{fold}/effects.parquet",
        features=feature_files,
    output:
        locations="results/{dataset}/seed{seed}/fold{fold}/locations.parquet",
        clusters="results/{dataset}/seed{seed}/fold{fold}/clusters.parquet",
        gene_features="results/{dataset}/seed{seed}/fold{fold}/gene_features.parquet",
        gene_names="results/{dataset}/seed{seed}/fold{fold}/gene_names.parquet",
    log:
        "<logs>/{dataset}/seed{seed}/fold{fold}/locate.log",
    benchmark:
        "<benchmarks>/{dataset}/seed{seed}/fold{fold}/locate.tsv"
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=memory(4000),
        runtime=minutes(60),
    params:
        dataset=dataset_block,
        config=block("location", "clusters"),
        code=code("locate.py"),
    script:
        "../workflow_scripts/locate.py"


rule enrichment:
    input:
        clusters="results/{dataset}/seed{seed}/fold{fold}/clusters.parquet",
        features=feature_files,
    output:
        enrichment="results/{dataset}/seed{seed}/fold{fold}/enrichment.parquet",
    log:
        "<logs>/{dataset}/seed{seed}/fold{fold}/enrichment.log",
    benchmark:
        "<benchmarks>/{dataset}/seed{seed}/fold{fold}/enrichment.tsv"
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=memory(2000),
        runtime=minutes(20),
    params:
        dataset=dataset_block,
        code=code("enrichment.py"),
    script:
        "../workflow_scripts/enrichment.py"


rule embedding:
    input:
        effects="results/{dataset}/seed{seed}/fold{fold}/effects.parquet",
        splits="results/{dataset}/seed{seed}/splits.json",
        locations="results/{dataset}/seed{seed}/fold{fold}/locations.parquet",
        gene_features="results/{dataset}/seed{seed}/fold{fold}/gene_features.parquet",
    output:
        embedding="results/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/embedding.parquet",
    log:
        "<logs>/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/embedding.log",
    benchmark:
        "<benchmarks>/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/embedding.tsv"
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=memory(2000),
        runtime=minutes(20),
    params:
        config=block("embedding"),
        code=code("embedding.py"),
    script:
        "../workflow_scripts/embedding.py"
