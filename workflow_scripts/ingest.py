"""Rule ingest: counts of any supported layout to one canonical AnnData file."""

from dbdiffusion.config.datasets import Dataset
from dbdiffusion.config.parse import parse
from dbdiffusion.data.ingest import write_ingested
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    write_ingested(parse(Dataset, snakemake.params.dataset), source=snakemake.input.source, out=snakemake.output.counts)
