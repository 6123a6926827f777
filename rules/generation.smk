# Cells of held-out and unmeasured perturbations.


rule generate:
    input:
        embedding="results/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/embedding.parquet",
        effects="results/{dataset}/seed{seed}/fold{fold}/effects.parquet",
        vae="results/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/vae.safetensors",
        vae_record="results/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/vae.json",
        diffusion="results/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/diffusion.safetensors",
        diffusion_record="results/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/diffusion.json",
        guidance=TUNED_GUIDANCE,
    output:
        generated="results/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/generated.h5ad",
        means="results/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/means.parquet",
    log:
        "<logs>/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/generate.log",
    benchmark:
        "<benchmarks>/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/generate.tsv"
    conda:
        TORCH_ENV
    threads: 1
    resources:
        mem_mb=memory(4000),
        runtime=minutes(120),
        gpu=GPUS,
    params:
        config=block("generation"),
        device=CONFIG.run.device,
        code=code("generate.py"),
    script:
        "../workflow_scripts/generate.py"


rule merge_generated:
    input:
        generated=expand(
            "results/{{dataset}}/seed{{seed}}/fold{{fold}}/crossfit{crossfit}/generated.h5ad", crossfit=CROSSFIT
        ),
        means=expand(
            "results/{{dataset}}/seed{{seed}}/fold{{fold}}/crossfit{crossfit}/means.parquet", crossfit=CROSSFIT
        ),
    output:
        generated=f"results/{{dataset}}/seed{{seed}}/fold{{fold}}/{GENERATOR}/generated.h5ad",
        means=f"results/{{dataset}}/seed{{seed}}/fold{{fold}}/{GENERATOR}/means.parquet",
    log:
        "<logs>/{dataset}/seed{seed}/fold{fold}/merge_generated.log",
    benchmark:
        "<benchmarks>/{dataset}/seed{seed}/fold{fold}/merge_generated.tsv"
    conda:
        TORCH_ENV
    threads: 1
    resources:
        mem_mb=memory(3000),
        runtime=minutes(30),
    params:
        code=code("merge_generated.py"),
    script:
        "../workflow_scripts/merge_generated.py"


use rule generate as generate_doubled with:
    output:
        generated=temp("results/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/doubled/generated.h5ad"),
        means="results/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/doubled/means.parquet",
    log:
        "<logs>/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/generate_doubled.log",
    benchmark:
        "<benchmarks>/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/generate_doubled.tsv"
    params:
        config=twice_the_cells(),
        device=CONFIG.run.device,
        code=code("generate.py"),


use rule merge_generated as merge_doubled with:
    input:
        generated=expand(
            "results/{{dataset}}/seed{{seed}}/fold{{fold}}/crossfit{crossfit}/doubled/generated.h5ad",
            crossfit=CROSSFIT,
        ),
        means=expand(
            "results/{{dataset}}/seed{{seed}}/fold{{fold}}/crossfit{crossfit}/doubled/means.parquet", crossfit=CROSSFIT
        ),
    output:
        generated=temp("results/{dataset}/seed{seed}/fold{fold}/doubled/generated.h5ad"),
        means="results/{dataset}/seed{seed}/fold{fold}/doubled/means.parquet",
    log:
        "<logs>/{dataset}/seed{seed}/fold{fold}/merge_doubled.log",
    benchmark:
        "<benchmarks>/{dataset}/seed{seed}/fold{fold}/merge_doubled.tsv"
