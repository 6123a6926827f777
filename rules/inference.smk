# Debiased estimates, tests, calls and their calibration.


rule test_de:
    input:
        unpack(method_means),
        effects="results/{dataset}/seed{seed}/fold{fold}/effects.parquet",
        locations="results/{dataset}/seed{seed}/fold{fold}/locations.parquet",
    output:
        de="results/{dataset}/seed{seed}/fold{fold}/de.parquet",
    log:
        "<logs>/{dataset}/seed{seed}/fold{fold}/test_de.log",
    benchmark:
        "<benchmarks>/{dataset}/seed{seed}/fold{fold}/test_de.tsv"
    conda:
        "../envs/inference.yaml"
    threads: 1
    resources:
        mem_mb=memory(3000, times_input=8),
        runtime=minutes(60),
    params:
        methods=METHODS,
        config=block("inference"),
        code=code("test_de.py"),
    script:
        "../workflow_scripts/test_de.py"


rule de_table:
    input:
        tables=per_fold("results/{dataset}/seed{seed}/fold{fold}/de.parquet"),
    output:
        table="results/{dataset}/tables/de.parquet",
    log:
        "<logs>/{dataset}/de_table.log",
    benchmark:
        "<benchmarks>/{dataset}/de_table.tsv"
    conda:
        "../envs/inference.yaml"
    threads: 1
    resources:
        mem_mb=memory(2000, times_input=20),
        runtime=minutes(30),
    params:
        contract="de",
        code=code("concatenate.py"),
    script:
        "../workflow_scripts/concatenate.py"


rule calibration:
    input:
        unpack(further_checks),
        splits=f"results/{{dataset}}/seed{SEEDS[0]}/splits.json",
        moments=f"results/{{dataset}}/seed{SEEDS[0]}/moments.h5ad",
        effects=expand("results/{{dataset}}/seed{seed}/fold{fold}/effects.parquet", seed=SEEDS[0], fold=HELD_OUT_FOLDS),
        locations=expand(
            "results/{{dataset}}/seed{seed}/fold{fold}/locations.parquet", seed=SEEDS[0], fold=HELD_OUT_FOLDS
        ),
        de=expand("results/{{dataset}}/seed{seed}/fold{fold}/de.parquet", seed=SEEDS[0], fold=HELD_OUT_FOLDS),
        means=expand(
            "results/{{dataset}}/seed{seed}/fold{fold}/{method}/means.parquet",
            seed=SEEDS[0],
            fold=HELD_OUT_FOLDS,
            method=METHODS,
        ),
    output:
        calibration="results/{dataset}/tables/calibration.parquet",
    log:
        "<logs>/{dataset}/calibration.log",
    benchmark:
        "<benchmarks>/{dataset}/calibration.tsv"
    wildcard_constraints:
        dataset=names_or_none(DATASETS),
    conda:
        "../envs/inference.yaml"
    threads: 1
    resources:
        mem_mb=memory(4000, times_input=8),
        runtime=minutes(120),
    params:
        folds=HELD_OUT_FOLDS,
        methods=METHODS,
        seed=SEEDS[0],
        config=block("inference"),
        code=code("calibration.py"),
    script:
        "../workflow_scripts/calibration.py"


rule study:
    output:
        study="results/calibration/study.parquet",
    log:
        "<logs>/study.log",
    benchmark:
        "<benchmarks>/study.tsv"
    conda:
        "../envs/inference.yaml"
    threads: workflow.cores
    resources:
        mem_mb=8000,
        runtime=minutes(720),
    params:
        # Keyed by the code: screens of an older version are not taken for this one's.
        scratch=f"results/calibration/scratch_{code('study.py')}",
        screens=CONFIG.calibration.study_screens,
        code=code("study.py"),
    script:
        "../workflow_scripts/study.py"
