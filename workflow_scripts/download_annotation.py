"""Rule download_annotation: one file of a public gene annotation, resumed and checked."""

from pathlib import Path

from dbdiffusion.data.download import download
from dbdiffusion.perturbations.annotations import files_of, read_annotations
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    out = Path(snakemake.output[0])
    address, checksum = files_of(read_annotations(snakemake.input.table).values())[out.name]
    download([address], out, sha256=checksum, record=snakemake.params.record)
