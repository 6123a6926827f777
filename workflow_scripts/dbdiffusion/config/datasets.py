"""config block `datasets`: where counts come from and what their labels mean."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from dbdiffusion.config.base import Block


class FeatureSource(Block):
    """A source of gene features for locating unmeasured perturbations."""

    kind: Literal["coexpression", "gene_sets", "pairs", "table"]
    """coexpression: loadings learned from training cells; gene_sets: .gmt(.gz); pairs: two columns of symbols (.csv/.tsv, .gz);
    table: gene x dimension (.tsv, .csv, .parquet or .npz with arrays `genes` and `values`)."""
    path: str | None = None
    """File of the source (null for coexpression)."""
    dimensions: int = Field(64, ge=2)
    """Dimensions kept after the spectral reduction."""
    min_size: int = Field(3, ge=1)
    """Smallest gene set that is used."""
    max_size: int = Field(500, ge=1)
    """Largest gene set that is used: large sets say little about a gene."""

    @model_validator(mode="after")
    def _path(self) -> FeatureSource:
        if (self.kind == "coexpression") == (self.path is not None):
            raise ValueError(f"a source of kind {self.kind!r} needs {'no path' if self.kind == 'coexpression' else 'a path'}")
        return self

    @property
    def name(self) -> str:
        """Short name in tables and figures."""
        if self.path is None:
            return self.kind
        stem = re.sub(r"(\.(gmt|csv|tsv|txt|parquet|npz|gz))+$", "", self.path.replace("\\", "/").rsplit("/", 1)[-1])
        return f"{self.kind}:{stem}"


class Columns(Block):
    """What the cell table's columns are called."""

    perturbation: str = "perturbation"
    """Column with the perturbed gene or the control label."""
    guide: str | None = None
    """Column with the guide, where there is one (needed for the control-guide calibration)."""
    batch: str | None = None
    """Column with the batch; effects are taken within batch."""
    library_size: str | None = None
    """Column with the total counts over the whole transcriptome; null: the sum over the genes of the file."""
    modality: str | None = None
    """Column with the kind of perturbation (knockout, CRISPRi, CRISPRa), where one file holds several screens. See `modality`."""


class Labels(Block):
    """How perturbation labels are written."""

    control: list[str] = Field(["control", "ctrl", "non-targeting", "NT"], min_length=1)
    """Labels of control cells; matched whole, and case-insensitively."""
    combination_separator: str | None = "+"
    """Separator of declared combinations (`A+B`, `A+ctrl`, `A_B`); null: there are no combinations."""
    multi_guide_separator: str | None = None
    """Separator of guides or genes in cells that carry several without being declared combinations; such cells are dropped."""
    drop: list[str] = Field([])
    """Labels of cells to leave out (unassigned, doublets)."""
    pattern: str | None = None
    """Regular expression whose first group is the perturbation within a label, e.g. `^(.+)_p[A-Z]+[0-9]+$` for gene_plasmid or
    `^(.+)g[0-9]+$` for guide names. It must fit whole labels; labels it does not fit stay as they are. null: labels
    are taken as written."""

    @field_validator("pattern")
    @classmethod
    def _has_group(cls, value: str | None) -> str | None:
        try:
            usable = value is None or re.compile(value).groups > 0
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        if not usable:
            raise ValueError("put the perturbation into a group: ( )")
        return value


class GuideAssignment(Block):
    """Assigning guides from a cells x guides count matrix."""

    min_counts: int = Field(5, ge=1)
    """A guide is present at this many UMI or more."""
    min_share: float = Field(0.8, gt=0, le=1)
    """The present guides of the cell's perturbation must together hold this share of its guide UMI. Cells with present guides of
    several genes count as multi-guide, unless the guide table declares that combination."""


class _Dataset(Block):
    columns: Columns = Columns()
    """What the columns of the cell table are called."""
    modality: str | None = None
    """Value of columns.modality whose cells are analysed; control cells without a value belong to all. Needed where the column has several:
    opposite modalities of a gene are never averaged, nor neighbours of each other. Write one dataset block for each."""
    labels: Labels = Labels()
    """How perturbation labels are written."""
    features: list[FeatureSource] = Field([FeatureSource(kind="coexpression")], min_length=1)
    """Sources of gene features used to locate unmeasured perturbations."""
    aliases: str | None = None
    """Table of gene aliases (.csv, .tsv, .txt, also .gz, with a header): two names of one gene a row, in either order. It is asked for
    genes that a feature source does not have under the name in the data. Versions, renamed families, R dots and case need none."""

    contexts: Literal["matched", "meta"] = "matched"
    """Batches or cell lines (columns.batch): matched: one effect over all of a perturbation's cells, against a control of the same batch
    composition; meta: an effect within each batch against its own control, pooled by inverse variance, the standard error widened where
    batches disagree. meta stores sums for each perturbation and batch: for screens of few batches with many cells each."""


class SimulateDataset(_Dataset):
    """A simulated screen with known truth (docs/method.md says how)."""

    kind: Literal["simulate"] = "simulate"
    """A simulated screen, seeded, whose true effects are known."""
    seed: int = 1
    """Seed of the simulated screen (not of the analysis)."""
    perturbations: int = Field(60, ge=8)
    """Single perturbations, those without effect included."""
    doubles: int = Field(8, ge=0)
    """Double perturbations A+B."""
    cells_per_perturbation: int = Field(70, ge=5)
    """Mean number of cells of a perturbation."""
    control_guides: int = Field(8, ge=1)
    """Non-targeting guides."""
    cells_per_control_guide: int = Field(70, ge=5)
    """Mean number of cells of a non-targeting guide."""
    genes: int = Field(600, ge=50)
    """Measured genes."""
    programmes: int = Field(8, ge=1)
    """Gene programmes shared by perturbations."""
    batches: int = Field(3, ge=1)
    """Batches, with shifts of their own."""
    null_share: float = Field(0.2, ge=0, lt=1)
    """Share of perturbations without any effect."""
    escaper_share: float = Field(0.15, ge=0, lt=1)
    """Share of cells of a guide that escape the perturbation."""
    effect_sd: float = Field(0.8, gt=0)
    """Size of programme effects, natural log of the mean count."""
    own_effect_sd: float = Field(0.15, ge=0)
    """Size of effects a perturbation does not share with its programme."""
    library_size: float = Field(4000.0, gt=0)
    """Median total counts of a cell."""
    depth_confounding: float = Field(0.1, ge=0)
    """Sd over perturbations of the log depth shift."""
    annotation_noise: float = Field(0.15, ge=0, le=1)
    """Share of simulated gene annotations that are random; 1 makes them useless."""


class FileDataset(_Dataset):
    """Counts in a file or folder on this machine."""

    kind: Literal["h5ad", "10x_h5", "10x_mtx"]
    """h5ad; 10x_h5: Cell Ranger .h5; 10x_mtx: folder with matrix, features and barcodes."""
    path: str
    """File or folder, relative to the working directory or absolute."""
    cell_table: str | None = None
    """For 10x data: .csv/.tsv with column `cell` and the columns named under `columns`."""
    guide_counts: str | None = None
    """For 10x data: guide-count matrix (.csv/.tsv, cells x guides), or `features` to use the CRISPR Guide Capture rows of the same file."""
    guide_table: str | None = None
    """With guide_counts: .csv/.tsv with columns `guide` and `perturbation`."""
    guide_assignment: GuideAssignment = GuideAssignment()
    """With guide_counts: when a guide counts as present in a cell."""
    layer: str | None = None
    """Layer of the .h5ad with raw counts; null: X."""


class CatalogueDataset(_Dataset):
    """A public screen of resources/datasets.tsv, fetched by the download rule."""

    kind: Literal["catalogue"]
    """A row of the datasets table."""
    name: str
    """Row of resources/datasets.tsv."""
    version: str | None = None
    """Version of that row; null: its only or newest one."""
    layer: str | None = None
    """Layer of the .h5ad with raw counts; null: X."""


Dataset = Annotated[SimulateDataset | FileDataset | CatalogueDataset, Field(discriminator="kind")]
