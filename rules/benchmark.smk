# Baselines, scores against held-out cells, and what the run cost.


rule baselines:
    input:
        effects="results/{dataset}/seed{seed}/fold{fold}/effects.parquet",
        locations="results/{dataset}/seed{seed}/fold{fold}/locations.parquet",
        splits="results/{dataset}/seed{seed}/splits.json",
        gene_features="results/{dataset}/seed{seed}/fold{fold}/gene_features.parquet",
    output:
        [f"results/{{dataset}}/seed{{seed}}/fold{{fold}}/{baseline}/means.parquet" for baseline in BASELINES],
    log:
        "<logs>/{dataset}/seed{seed}/fold{fold}/baselines.log",
    benchmark:
        "<benchmarks>/{dataset}/seed{seed}/fold{fold}/baselines.tsv"
    conda:
        "../envs/inference.yaml"
    threads: 1
    resources:
        mem_mb=memory(3000),
        runtime=minutes(60),
    params:
        names=BASELINES,
        code=code("baselines.py"),
    script:
        "../workflow_scripts/baselines.py"


rule location_quality:
    input:
        moments="results/{dataset}/seed{seed}/moments.h5ad",
        splits="results/{dataset}/seed{seed}/splits.json",
        effects="results/{dataset}/seed{seed}/fold{fold}/effects.parquet",
        locations="results/{dataset}/seed{seed}/fold{fold}/locations.parquet",
        clusters="results/{dataset}/seed{seed}/fold{fold}/clusters.parquet",
        gene_features="results/{dataset}/seed{seed}/fold{fold}/gene_features.parquet",
    output:
        quality="results/{dataset}/seed{seed}/fold{fold}/location_quality.parquet",
    log:
        "<logs>/{dataset}/seed{seed}/fold{fold}/location_quality.log",
    benchmark:
        "<benchmarks>/{dataset}/seed{seed}/fold{fold}/location_quality.tsv"
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=memory(3000, times_input=10),
        runtime=minutes(60),
    params:
        config=block("location", "clusters"),
        code=code("location_quality.py"),
    script:
        "../workflow_scripts/location_quality.py"


rule location_quality_table:
    input:
        tables=per_fold("results/{dataset}/seed{seed}/fold{fold}/location_quality.parquet", HELD_OUT_FOLDS),
    output:
        table="results/{dataset}/tables/location_quality.parquet",
    log:
        "<logs>/{dataset}/location_quality_table.log",
    benchmark:
        "<benchmarks>/{dataset}/location_quality_table.tsv"
    conda:
        "../envs/inference.yaml"
    threads: 1
    resources:
        mem_mb=memory(2000, times_input=20),
        runtime=minutes(10),
    params:
        contract="location_quality",
        code=code("concatenate.py"),
    script:
        "../workflow_scripts/concatenate.py"


rule score:
    input:
        unpack(method_means),
        cells="results/{dataset}/qc/cells.h5ad",
        splits="results/{dataset}/seed{seed}/splits.json",
        moments="results/{dataset}/seed{seed}/moments.h5ad",
        effects="results/{dataset}/seed{seed}/fold{fold}/effects.parquet",
        locations="results/{dataset}/seed{seed}/fold{fold}/locations.parquet",
        de="results/{dataset}/seed{seed}/fold{fold}/de.parquet",
        generated=f"results/{{dataset}}/seed{{seed}}/fold{{fold}}/{GENERATOR}/generated.h5ad",
    output:
        scores="results/{dataset}/seed{seed}/fold{fold}/scores.parquet",
    log:
        "<logs>/{dataset}/seed{seed}/fold{fold}/score.log",
    benchmark:
        "<benchmarks>/{dataset}/seed{seed}/fold{fold}/score.tsv"
    conda:
        "../envs/inference.yaml"
    threads: 1
    resources:
        mem_mb=memory(4000),
        runtime=minutes(60),
    params:
        methods=METHODS,
        config=block("benchmark"),
        code=code("score.py"),
    script:
        "../workflow_scripts/score.py"


rule score_table:
    input:
        tables=per_fold("results/{dataset}/seed{seed}/fold{fold}/scores.parquet", HELD_OUT_FOLDS),
    output:
        table="results/{dataset}/tables/scores.parquet",
    log:
        "<logs>/{dataset}/score_table.log",
    benchmark:
        "<benchmarks>/{dataset}/score_table.tsv"
    conda:
        "../envs/inference.yaml"
    threads: 1
    resources:
        mem_mb=memory(2000, times_input=20),
        runtime=minutes(10),
    params:
        contract="scores",
        code=code("concatenate.py"),
    script:
        "../workflow_scripts/concatenate.py"


rule compute:
    input:
        unpack(cost_files),
        vae_records=per_model("vae.json"),
        diffusion_records=per_model("diffusion.json"),
    output:
        compute="results/{dataset}/tables/compute.parquet",
    log:
        "<logs>/{dataset}/compute.log",
    benchmark:
        "<benchmarks>/{dataset}/compute.tsv"
    conda:
        "../envs/inference.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=minutes(10),
    params:
        rules=list(COSTS),
        code=code("compute.py"),
    script:
        "../workflow_scripts/compute.py"


rule cell_quality:
    input:
        cells="results/{dataset}/qc/cells.h5ad",
        splits="results/{dataset}/seed{seed}/splits.json",
        moments="results/{dataset}/seed{seed}/moments.h5ad",
        effects="results/{dataset}/seed{seed}/fold{fold}/effects.parquet",
        generated=f"results/{{dataset}}/seed{{seed}}/fold{{fold}}/{GENERATOR}/generated.h5ad",
        means=f"results/{{dataset}}/seed{{seed}}/fold{{fold}}/{GENERATOR}/means.parquet",
        seen_generated=expand(
            "results/{{dataset}}/seed{{seed}}/fold{{fold}}/crossfit{crossfit}/generated.h5ad", crossfit=CROSSFIT
        ),
        seen_means=expand(
            "results/{{dataset}}/seed{{seed}}/fold{{fold}}/crossfit{crossfit}/means.parquet", crossfit=CROSSFIT
        ),
    output:
        quality="results/{dataset}/seed{seed}/fold{fold}/cell_quality.parquet",
    log:
        "<logs>/{dataset}/seed{seed}/fold{fold}/cell_quality.log",
    benchmark:
        "<benchmarks>/{dataset}/seed{seed}/fold{fold}/cell_quality.tsv"
    conda:
        "../envs/inference.yaml"
    threads: 1
    resources:
        mem_mb=memory(4000),
        runtime=minutes(60),
    params:
        config=block("benchmark"),
        code=code("cell_quality.py"),
    script:
        "../workflow_scripts/cell_quality.py"


rule cell_quality_table:
    input:
        tables=per_fold("results/{dataset}/seed{seed}/fold{fold}/cell_quality.parquet", HELD_OUT_FOLDS),
    output:
        table="results/{dataset}/tables/cell_quality.parquet",
    log:
        "<logs>/{dataset}/cell_quality_table.log",
    benchmark:
        "<benchmarks>/{dataset}/cell_quality_table.tsv"
    conda:
        "../envs/inference.yaml"
    threads: 1
    resources:
        mem_mb=memory(2000, times_input=20),
        runtime=minutes(10),
    params:
        contract="cell_quality",
        code=code("concatenate.py"),
    script:
        "../workflow_scripts/concatenate.py"
