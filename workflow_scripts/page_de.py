"""Rule page_de: the report's table of calls."""

from dbdiffusion.figures.tables_html import write_de_page
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    inference = snakemake.params.config["inference"]
    write_de_page(
        de=snakemake.input.de,
        out_html=snakemake.output.page,
        method=snakemake.params.method,
        test=inference["calls"],
        q=inference["q"],
    )
