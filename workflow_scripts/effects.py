"""Rule effects: gene panel, training perturbations and their effect sizes in one fold."""

from dbdiffusion.config.parse import parse
from dbdiffusion.config.qc import PanelConfig
from dbdiffusion.perturbations.effects import write_effects
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    write_effects(
        moments=snakemake.input.moments,
        splits=snakemake.input.splits,
        fold=snakemake.wildcards.fold,
        config=parse(PanelConfig, snakemake.params.config["panel"]),
        effects=snakemake.output.effects,
        panel=snakemake.output.panel,
    )
