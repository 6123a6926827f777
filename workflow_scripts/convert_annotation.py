"""Rule convert_annotation: a public gene annotation as gene sets or pairs of symbols."""

from dbdiffusion.perturbations.annotations import write_annotation
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    write_annotation(
        table=snakemake.input.table,
        name=snakemake.wildcards.annotation,
        files=snakemake.input.files,
        out=snakemake.output[0],
    )
