# Convert a Seurat object (.rds) into a folder in the 10x layout with a cell table:
#   Rscript convert_seurat.R in.rds out_dir
# writes matrix.mtx.gz (genes x cells), features.tsv.gz, barcodes.tsv.gz and cells.tsv (column `cell`, then the object's cell metadata).
# Needs the R packages Seurat and Matrix. The assay is RNA, its matrix the raw counts.

suppressPackageStartupMessages({
  library(Matrix)
  library(Seurat)
})

arguments <- commandArgs(trailingOnly = TRUE)
if (length(arguments) != 2) stop("usage: Rscript convert_seurat.R in.rds out_dir")
source_file <- arguments[1]
out_dir <- arguments[2]
if (!file.exists(source_file)) stop("file not found: ", source_file)

object <- UpdateSeuratObject(readRDS(source_file))
if (!"RNA" %in% Assays(object)) stop("no assay RNA in ", source_file, "; found ", paste(Assays(object), collapse = ", "))
# Seurat 5 calls the matrices of an assay layers, earlier versions slots.
if (utils::packageVersion("SeuratObject") >= "5.0.0") {
  counts <- GetAssayData(object, assay = "RNA", layer = "counts")
} else {
  counts <- GetAssayData(object, assay = "RNA", slot = "counts")
}
if (length(counts) == 0) stop("assay RNA of ", source_file, " has no counts")
counts <- as(as(counts, "CsparseMatrix"), "generalMatrix")

dir.create(out_dir, recursive = TRUE, showWarnings = FALSE)

gzip <- function(from, to) {
  input <- file(from, "rb")
  output <- gzfile(to, "wb")
  repeat {
    bytes <- readBin(input, "raw", 2^24)
    if (length(bytes) == 0) break
    writeBin(bytes, output)
  }
  close(input)
  close(output)
  unlink(from)
}

write_lines_gz <- function(lines, path) {
  connection <- gzfile(path, "w")
  writeLines(lines, connection)
  close(connection)
}

# The matrix first goes to a plain file: writeMM cannot write to a connection.
plain <- file.path(out_dir, "matrix.mtx")
writeMM(counts, plain)
gzip(plain, file.path(out_dir, "matrix.mtx.gz"))
write_lines_gz(paste(rownames(counts), rownames(counts), "Gene Expression", sep = "\t"), file.path(out_dir, "features.tsv.gz"))
write_lines_gz(colnames(counts), file.path(out_dir, "barcodes.tsv.gz"))

metadata <- object[[]][colnames(counts), , drop = FALSE]
metadata <- metadata[, setdiff(colnames(metadata), "cell"), drop = FALSE]
cells <- data.frame(cell = colnames(counts), metadata, check.names = FALSE)
for (name in colnames(cells)) {
  # Text without tabs or line ends, so that one cell stays one row.
  if (!is.numeric(cells[[name]])) cells[[name]] <- gsub("[\t\r\n]", " ", as.character(cells[[name]]))
}
write.table(cells, file.path(out_dir, "cells.tsv"), sep = "\t", quote = FALSE, row.names = FALSE, na = "")
