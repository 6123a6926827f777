# Figures and pages of the report.


rule figure_qc:
    input:
        cells="results/{dataset}/qc/cells.h5ad",
        summary="results/{dataset}/qc/summary.json",
        on_target="results/{dataset}/qc/on_target.parquet",
    output:
        png=report(
            "results/{dataset}/figures/qc.png",
            caption="report/qc.rst",
            category="{dataset}",
            subcategory="1 Data",
            labels={"figure": "quality control"},
        ),
        pdf="results/{dataset}/figures/qc.pdf",
    log:
        "<logs>/{dataset}/figure_qc.log",
    conda:
        "../envs/figures.yaml"
    threads: 1
    resources:
        mem_mb=memory(2000),
        runtime=minutes(20),
    params:
        code=code("figure_qc.py"),
    script:
        "../workflow_scripts/figure_qc.py"


rule figure_perturbation_map:
    input:
        clusters="results/{dataset}/seed{seed}/fold{fold}/clusters.parquet",
    output:
        png=report(
            "results/{dataset}/figures/seed{seed}_fold{fold}_perturbation_map.png",
            caption="report/perturbation_map.rst",
            category="{dataset}",
            subcategory="2 Embedding and location",
            labels={"figure": "perturbation map, fold {fold}"},
        ),
        pdf="results/{dataset}/figures/seed{seed}_fold{fold}_perturbation_map.pdf",
    log:
        "<logs>/{dataset}/seed{seed}/fold{fold}/figure_perturbation_map.log",
    conda:
        "../envs/figures.yaml"
    threads: 1
    resources:
        mem_mb=memory(1000),
        runtime=minutes(10),
    params:
        code=code("figure_perturbation_map.py"),
    script:
        "../workflow_scripts/figure_perturbation_map.py"


rule figure_gene_map:
    input:
        clusters="results/{dataset}/seed{seed}/fold{fold}/clusters.parquet",
        splits="results/{dataset}/seed{seed}/splits.json",
    output:
        png=report(
            "results/{dataset}/figures/seed{seed}_fold{fold}_gene_map.png",
            caption="report/gene_map.rst",
            category="{dataset}",
            subcategory="2 Embedding and location",
            labels={"figure": "gene map, fold {fold}"},
        ),
        pdf="results/{dataset}/figures/seed{seed}_fold{fold}_gene_map.pdf",
    log:
        "<logs>/{dataset}/seed{seed}/fold{fold}/figure_gene_map.log",
    conda:
        "../envs/figures.yaml"
    threads: 1
    resources:
        mem_mb=memory(1000),
        runtime=minutes(10),
    params:
        code=code("figure_gene_map.py"),
    script:
        "../workflow_scripts/figure_gene_map.py"


rule figure_training:
    input:
        vae=per_model("vae.json"),
        diffusion=per_model("diffusion.json"),
    output:
        png=report(
            "results/{dataset}/figures/training.png",
            caption="report/training.rst",
            category="{dataset}",
            subcategory="3 Generator",
            labels={"figure": "training curves"},
        ),
        pdf="results/{dataset}/figures/training.pdf",
    log:
        "<logs>/{dataset}/figure_training.log",
    conda:
        "../envs/figures.yaml"
    threads: 1
    resources:
        mem_mb=memory(1000),
        runtime=minutes(10),
    params:
        code=code("figure_training.py"),
    script:
        "../workflow_scripts/figure_training.py"


rule figure_predicted_observed:
    input:
        de="results/{dataset}/tables/de.parquet",
        moments=f"results/{{dataset}}/seed{SEEDS[0]}/moments.h5ad",
        splits=f"results/{{dataset}}/seed{SEEDS[0]}/splits.json",
    output:
        png=report(
            "results/{dataset}/figures/predicted_observed.png",
            caption="report/predicted_observed.rst",
            category="{dataset}",
            subcategory="4 Predictions",
            labels={"figure": "predicted against observed change"},
        ),
        pdf="results/{dataset}/figures/predicted_observed.pdf",
    log:
        "<logs>/{dataset}/figure_predicted_observed.log",
    conda:
        "../envs/figures.yaml"
    threads: 1
    resources:
        mem_mb=memory(2000, times_input=10),
        runtime=minutes(10),
    params:
        folds=HELD_OUT_FOLDS,
        seed=SEEDS[0],
        method=SHOWN,
        config=block("benchmark"),
        code=code("figure_predicted_observed.py"),
    script:
        "../workflow_scripts/figure_predicted_observed.py"


rule figure_intervals:
    input:
        de="results/{dataset}/tables/de.parquet",
        moments=f"results/{{dataset}}/seed{SEEDS[0]}/moments.h5ad",
        splits=f"results/{{dataset}}/seed{SEEDS[0]}/splits.json",
    output:
        png=report(
            "results/{dataset}/figures/intervals.png",
            caption="report/intervals.rst",
            category="{dataset}",
            subcategory="4 Predictions",
            labels={"figure": "intervals of one target's genes"},
        ),
        pdf="results/{dataset}/figures/intervals.pdf",
    log:
        "<logs>/{dataset}/figure_intervals.log",
    conda:
        "../envs/figures.yaml"
    threads: 1
    resources:
        mem_mb=memory(2000, times_input=10),
        runtime=minutes(10),
    params:
        folds=HELD_OUT_FOLDS,
        seed=SEEDS[0],
        method=SHOWN,
        config=block("inference"),
        code=code("figure_intervals.py"),
    script:
        "../workflow_scripts/figure_intervals.py"


rule figure_targets:
    input:
        de="results/{dataset}/tables/de.parquet",
        splits=f"results/{{dataset}}/seed{SEEDS[0]}/splits.json",
    output:
        png=report(
            "results/{dataset}/figures/targets.png",
            caption="report/targets.rst",
            category="{dataset}",
            subcategory="4 Predictions",
            labels={"figure": "targets nobody measured"},
        ),
        pdf="results/{dataset}/figures/targets.pdf",
    log:
        "<logs>/{dataset}/figure_targets.log",
    conda:
        "../envs/figures.yaml"
    threads: 1
    resources:
        mem_mb=memory(2000, times_input=10),
        runtime=minutes(10),
    params:
        method=SHOWN,
        config=block("inference"),
        code=code("figure_targets.py"),
    script:
        "../workflow_scripts/figure_targets.py"


rule figure_scores:
    input:
        scores="results/{dataset}/tables/scores.parquet",
    output:
        png=report(
            "results/{dataset}/figures/scores.png",
            caption="report/scores.rst",
            category="{dataset}",
            subcategory="5 Benchmark",
            labels={"figure": "scores per method"},
        ),
        pdf="results/{dataset}/figures/scores.pdf",
    log:
        "<logs>/{dataset}/figure_scores.log",
    conda:
        "../envs/figures.yaml"
    threads: 1
    resources:
        mem_mb=memory(1000),
        runtime=minutes(10),
    params:
        config=block("benchmark"),
        code=code("figure_scores.py"),
    script:
        "../workflow_scripts/figure_scores.py"


rule figure_calibration:
    input:
        calibration="results/{dataset}/tables/calibration.parquet",
    output:
        png=report(
            "results/{dataset}/figures/calibration.png",
            caption="report/calibration.rst",
            category="{dataset}",
            subcategory="6 Calibration",
            labels={"figure": "do the error rates hold?"},
        ),
        pdf="results/{dataset}/figures/calibration.pdf",
    log:
        "<logs>/{dataset}/figure_calibration.log",
    conda:
        "../envs/figures.yaml"
    threads: 1
    resources:
        mem_mb=memory(1000),
        runtime=minutes(10),
    params:
        code=code("figure_calibration.py"),
    script:
        "../workflow_scripts/figure_calibration.py"


rule figure_compute:
    input:
        compute="results/{dataset}/tables/compute.parquet",
    output:
        png=report(
            "results/{dataset}/figures/compute.png",
            caption="report/compute.rst",
            category="{dataset}",
            subcategory="7 Cost",
            labels={"figure": "compute cost"},
        ),
        pdf="results/{dataset}/figures/compute.pdf",
    log:
        "<logs>/{dataset}/figure_compute.log",
    conda:
        "../envs/figures.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=minutes(10),
    params:
        code=code("figure_compute.py"),
    script:
        "../workflow_scripts/figure_compute.py"


rule figure_cells:
    input:
        cells="results/{dataset}/qc/cells.h5ad",
        generated=f"results/{{dataset}}/seed{{seed}}/fold{{fold}}/{GENERATOR}/generated.h5ad",
        locations="results/{dataset}/seed{seed}/fold{fold}/locations.parquet",
        moments="results/{dataset}/seed{seed}/moments.h5ad",
        splits="results/{dataset}/seed{seed}/splits.json",
    output:
        png=report(
            "results/{dataset}/figures/seed{seed}_fold{fold}_cells.png",
            caption="report/cells.rst",
            category="{dataset}",
            subcategory="4 Predictions",
            labels={"figure": "real and generated cells, fold {fold}"},
        ),
        pdf="results/{dataset}/figures/seed{seed}_fold{fold}_cells.pdf",
    log:
        "<logs>/{dataset}/seed{seed}/fold{fold}/figure_cells.log",
    conda:
        "../envs/figures.yaml"
    threads: 1
    resources:
        mem_mb=memory(3000),
        runtime=minutes(20),
    params:
        config=block("benchmark"),
        code=code("figure_cells.py"),
    script:
        "../workflow_scripts/figure_cells.py"


rule figure_enrichment:
    input:
        enrichment="results/{dataset}/seed{seed}/fold{fold}/enrichment.parquet",
    output:
        png=report(
            "results/{dataset}/figures/seed{seed}_fold{fold}_enrichment.png",
            caption="report/enrichment.rst",
            category="{dataset}",
            subcategory="2 Embedding and location",
            labels={"figure": "gene sets in the clusters, fold {fold}"},
        ),
        pdf="results/{dataset}/figures/seed{seed}_fold{fold}_enrichment.pdf",
    log:
        "<logs>/{dataset}/seed{seed}/fold{fold}/figure_enrichment.log",
    conda:
        "../envs/figures.yaml"
    threads: 1
    resources:
        mem_mb=memory(1000),
        runtime=minutes(10),
    params:
        code=code("figure_enrichment.py"),
    script:
        "../workflow_scripts/figure_enrichment.py"


rule figure_cell_quality:
    input:
        quality="results/{dataset}/tables/cell_quality.parquet",
    output:
        png=report(
            "results/{dataset}/figures/cell_quality.png",
            caption="report/cell_quality.rst",
            category="{dataset}",
            subcategory="4 Predictions",
            labels={"figure": "quality of generated cells"},
        ),
        pdf="results/{dataset}/figures/cell_quality.pdf",
    log:
        "<logs>/{dataset}/figure_cell_quality.log",
    conda:
        "../envs/figures.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=minutes(10),
    params:
        code=code("figure_cell_quality.py"),
    script:
        "../workflow_scripts/figure_cell_quality.py"


rule figure_location:
    input:
        embedding=f"results/{{dataset}}/seed{{seed}}/fold{{fold}}/crossfit{CROSSFIT[0]}/embedding.parquet",
        effects="results/{dataset}/seed{seed}/fold{fold}/effects.parquet",
        moments="results/{dataset}/seed{seed}/moments.h5ad",
        locations="results/{dataset}/seed{seed}/fold{fold}/locations.parquet",
        clusters="results/{dataset}/seed{seed}/fold{fold}/clusters.parquet",
        splits="results/{dataset}/seed{seed}/splits.json",
    output:
        png=report(
            "results/{dataset}/figures/seed{seed}_fold{fold}_location.png",
            caption="report/location.rst",
            category="{dataset}",
            subcategory="2 Embedding and location",
            labels={"figure": "located and true places, fold {fold}"},
        ),
        pdf="results/{dataset}/figures/seed{seed}_fold{fold}_location.pdf",
    log:
        "<logs>/{dataset}/seed{seed}/fold{fold}/figure_location.log",
    conda:
        "../envs/figures.yaml"
    threads: 1
    resources:
        mem_mb=memory(3000),
        runtime=minutes(20),
    params:
        config=block("embedding"),
        code=code("figure_location.py"),
    script:
        "../workflow_scripts/figure_location.py"


rule figure_location_quality:
    input:
        table="results/{dataset}/tables/location_quality.parquet",
    output:
        png=report(
            "results/{dataset}/figures/location_quality.png",
            caption="report/location_quality.rst",
            category="{dataset}",
            subcategory="2 Embedding and location",
            labels={"figure": "how well perturbations are located"},
        ),
        pdf="results/{dataset}/figures/location_quality.pdf",
    log:
        "<logs>/{dataset}/figure_location_quality.log",
    conda:
        "../envs/figures.yaml"
    threads: 1
    resources:
        mem_mb=memory(1000),
        runtime=minutes(10),
    params:
        config=block("benchmark", "location"),
        code=code("figure_location_quality.py"),
    script:
        "../workflow_scripts/figure_location_quality.py"


rule page_de:
    input:
        de="results/{dataset}/tables/de.parquet",
    output:
        page=report(
            "results/{dataset}/report/de.html",
            caption="report/table_de.rst",
            category="{dataset}",
            subcategory="4 Predictions",
            labels={"figure": "table of calls"},
        ),
    log:
        "<logs>/{dataset}/page_de.log",
    conda:
        "../envs/figures.yaml"
    threads: 1
    resources:
        mem_mb=memory(1000, times_input=10),
        runtime=minutes(10),
    params:
        method=SHOWN,
        config=block("inference"),
        code=code("page_de.py"),
    script:
        "../workflow_scripts/page_de.py"


rule page_scores:
    input:
        scores="results/{dataset}/tables/scores.parquet",
    output:
        page=report(
            "results/{dataset}/report/scores.html",
            caption="report/table_scores.rst",
            category="{dataset}",
            subcategory="5 Benchmark",
            labels={"figure": "table of scores"},
        ),
    log:
        "<logs>/{dataset}/page_scores.log",
    conda:
        "../envs/figures.yaml"
    threads: 1
    resources:
        mem_mb=memory(1000, times_input=10),
        runtime=minutes(10),
    params:
        method=SHOWN,
        config=block("inference"),
        code=code("page_scores.py"),
    script:
        "../workflow_scripts/page_scores.py"


rule figure_study:
    input:
        study="results/calibration/study.parquet",
    output:
        png=report(
            "results/calibration/study.png",
            caption="report/study.rst",
            category="calibration study",
            labels={"figure": "coverage, false discoveries and power on simulated screens"},
        ),
        pdf="results/calibration/study.pdf",
    log:
        "<logs>/figure_study.log",
    conda:
        "../envs/figures.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=minutes(10),
    params:
        code=code("figure_study.py"),
    script:
        "../workflow_scripts/figure_study.py"
