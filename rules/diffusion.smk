# The conditional latent diffusion model of every cross-fit model.


rule train_diffusion:
    input:
        cells="results/{dataset}/qc/cells.h5ad",
        splits="results/{dataset}/seed{seed}/splits.json",
        effects="results/{dataset}/seed{seed}/fold{fold}/effects.parquet",
        embedding="results/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/embedding.parquet",
        vae="results/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/vae.safetensors",
        vae_record="results/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/vae.json",
    output:
        weights="results/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/diffusion.safetensors",
        record="results/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/diffusion.json",
    log:
        "<logs>/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/train_diffusion.log",
    benchmark:
        "<benchmarks>/{dataset}/seed{seed}/fold{fold}/crossfit{crossfit}/train_diffusion.tsv"
    conda:
        TORCH_ENV
    threads: 1
    resources:
        mem_mb=memory(4000, times_input=12),
        runtime=minutes(720),
        gpu=GPUS,
    params:
        config=block("diffusion"),
        device=CONFIG.run.device,
        scratch=scratch("diffusion"),
        code=code("train_diffusion.py"),
    script:
        "../workflow_scripts/train_diffusion.py"
