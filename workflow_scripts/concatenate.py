"""Rules de_table, score_table, location_quality_table and cell_quality_table: the tables of all folds and seeds as one."""

from dbdiffusion.runtime.contracts import CONTRACTS
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    CONTRACTS[snakemake.params.contract].concatenate(list(snakemake.input.tables), snakemake.output.table)
