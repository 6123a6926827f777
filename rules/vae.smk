# The autoencoder of every cross-fit model.


rule train_vae:
    input:
        cells="results/{dataset}/qc/cells.h5ad",
        splits="results/{dataset}/seed{seed}/splits.json",
        effects="results/{dataset}/seed{seed}/fold{fold}/effects.parquet",
    output:
        weights=for_models("results/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/vae.safetensors"),
        record=for_models("results/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/vae.json"),
    log:
        f"<logs>/{{dataset}}/seed{{seed}}/fold{{fold}}/{OF_JOB}train_vae.log",
    benchmark:
        f"<benchmarks>/{{dataset}}/seed{{seed}}/fold{{fold}}/{OF_JOB}train_vae.tsv"
    conda:
        TORCH_ENV
    threads: 1
    resources:
        mem_mb=memory(4000, times_input=12 * AT_ONCE),
        runtime=minutes(240 * IN_TURN),
        gpu=GPUS,
    params:
        config=block("vae"),
        crossfit=models_of,
        device=CONFIG.run.device,
        scratch=scratch("vae"),
        code=code("train_vae.py"),
    script:
        "../workflow_scripts/train_vae.py"
