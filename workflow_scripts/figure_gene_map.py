"""Rule figure_gene_map."""

from dbdiffusion.data.splits import Splits
from dbdiffusion.figures.gene_map import draw_gene_map
from dbdiffusion.runtime.log import stage_log

with stage_log(snakemake.log[0]):
    splits, fold = Splits.read(snakemake.input.splits), snakemake.wildcards.fold
    genes = {gene for name in [*splits.training(fold), *splits.targets(fold)] for gene in name.split("+")}
    draw_gene_map(clusters=snakemake.input.clusters, perturbed=sorted(genes), png=snakemake.output.png, pdf=snakemake.output.pdf)
