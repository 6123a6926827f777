# The conditional latent diffusion model of every cross-fit model.


rule train_diffusion:
    input:
        cells="results/{dataset}/qc/cells.h5ad",
        splits="results/{dataset}/seed{seed}/splits.json",
        effects="results/{dataset}/seed{seed}/fold{fold}/effects.parquet",
        embedding=for_models("results/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/embedding.parquet"),
        vae=for_models("results/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/vae.safetensors"),
        vae_record=for_models("results/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/vae.json"),
    output:
        weights=for_models("results/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/diffusion.safetensors"),
        record=for_models("results/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/diffusion.json"),
    log:
        f"<logs>/{{dataset}}/seed{{seed}}/fold{{fold}}/{OF_JOB}train_diffusion.log",
    benchmark:
        f"<benchmarks>/{{dataset}}/seed{{seed}}/fold{{fold}}/{OF_JOB}train_diffusion.tsv"
    conda:
        TORCH_ENV
    threads: 1
    resources:
        mem_mb=memory(4000, times_input=12 * AT_ONCE),
        runtime=minutes(720 * IN_TURN),
        gpu=GPUS,
    params:
        config=block("diffusion"),
        crossfit=models_of,
        device=CONFIG.run.device,
        scratch=scratch("diffusion"),
        code=code("train_diffusion.py"),
    script:
        "../workflow_scripts/train_diffusion.py"


# Guidance is tuned on pseudo-targets, where the config asks for it; generation has the tuned strengths as an input then.
TUNED_GUIDANCE = (
    "results/{dataset}/seed{seed}/fold{fold}/guidance.json" if CONFIG.generation.guidance == "tuned" else []
)


rule try_guidance:
    input:
        embedding="results/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/embedding.parquet",
        effects="results/{dataset}/seed{seed}/fold{fold}/effects.parquet",
        vae="results/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/vae.safetensors",
        vae_record="results/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/vae.json",
        diffusion="results/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/diffusion.safetensors",
        diffusion_record="results/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/diffusion.json",
    output:
        trial="results/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/guidance.json",
    log:
        "<logs>/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/try_guidance.log",
    benchmark:
        "<benchmarks>/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/try_guidance.tsv"
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
        code=code("try_guidance.py"),
    script:
        "../workflow_scripts/try_guidance.py"


rule tune_guidance:
    input:
        trials=expand(
            "results/{{dataset}}/seed{{seed}}/fold{{fold}}/crossfit{crossfit}/guidance.json", crossfit=CROSSFIT
        ),
    output:
        guidance="results/{dataset}/seed{seed}/fold{fold}/guidance.json",
    log:
        "<logs>/{dataset}/seed{seed}/fold{fold}/tune_guidance.log",
    benchmark:
        "<benchmarks>/{dataset}/seed{seed}/fold{fold}/tune_guidance.tsv"
    conda:
        TORCH_ENV
    threads: 1
    resources:
        mem_mb=1000,
        runtime=minutes(10),
    params:
        code=code("tune_guidance.py"),
    script:
        "../workflow_scripts/tune_guidance.py"
