"""Rule page_scores: the report's table of mean scores."""

from dbdiffusion.figures.tables_html import write_score_page
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    write_score_page(scores=snakemake.input.scores, out_html=snakemake.output.page)
