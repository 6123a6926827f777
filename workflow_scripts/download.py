"""Rule download: a public screen from the first address that serves it, resumed and checked."""

from pathlib import Path

from dbdiffusion.data.catalogue import read_catalogue
from dbdiffusion.data.download import download
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    entries = {f"{entry.name}_{entry.version}{entry.suffix}": entry for entry in read_catalogue(snakemake.input.table).values()}
    out = Path(snakemake.output[0])
    entry = entries[out.name]
    # Snakemake deletes a failed job's output, so the partial file lies beside it.
    download(entry.urls, out, sha256=entry.sha256 or None, record=snakemake.params.record)
