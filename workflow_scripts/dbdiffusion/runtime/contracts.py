"""All tabular contracts of the workflow: the files between its stages, column by column."""

from __future__ import annotations

from dbdiffusion.runtime.tables import Column as C
from dbdiffusion.runtime.tables import Table

LOG_UNIT = "ln(1 + counts per 10,000)"
ROLES = ("target", "pseudo", "train", "control")
PARTS = ("effects", "features", "certainty")
CALLS = ("up", "down", "none", "no_call")

EFFECTS = Table(
    "effects",
    "Mean expression and effect size of the training perturbations of a fold and of the control. No held-out cell enters.",
    [
        C("perturbation", "str", "", "perturbation; `control` rows carry the control's own mean"),
        C("gene", "str", "", "gene symbol of the fold's panel"),
        C("mean", "float", LOG_UNIT, "mean expression, on the control's batch composition (control mean + effect)"),
        C("effect", "float", LOG_UNIT, "difference to the batch-matched control mean"),
        C("se", "float", LOG_UNIT, "standard error of the effect, cells as unit, control's error included"),
        C("variance", "float", LOG_UNIT + " squared", "variance between the cells of the perturbation"),
        C("n_cells", "int", "cells", "cells of the perturbation"),
    ],
    ("perturbation", "gene"),
)

LOCATIONS = Table(
    "locations",
    "Weights of every target and pseudo-target over training perturbations (itself excluded). A query that cannot be located has one row "
    "with an empty neighbour and weight 0.",
    [
        C(
            "fit",
            "str",
            "",
            "`all`: for debiasing (pseudo-targets are located without their own cells); `0`, `1`, ...: inside that cross-fit model",
        ),
        C("query", "str", "", "perturbation that is located"),
        C(
            "role",
            "str",
            "",
            "target (held out or never measured) or pseudo (training perturbation treated as unmeasured)",
            choices=("target", "pseudo"),
        ),
        C("neighbour", "str", "", "training perturbation, or `control` in additive locations"),
        C("weight", "float", "", "weight of the neighbour; weights of a query sum to 1"),
        C("k_eff", "float", "perturbations", "effective number of neighbours, 1 / sum of squared weights"),
        C("confidence", "float", "0-1", "location confidence"),
        C("kind", "str", "", "single, additive (sum of located parts) or measured", choices=("single", "additive")),
        C("parts_measured", "int", "", "number of parts of a combination that are measured singles; 0 for singles"),
        C("status", "str", "", "located or not_locatable", choices=("located", "not_locatable")),
        C("reason", "str", "", "why a query is not locatable, else empty"),
        C("locator", "str", "", "locator and feature sources that were used"),
    ],
    ("fit", "query", "neighbour"),
)

EMBEDDING = Table(
    "embedding",
    "What one cross-fit model is conditioned on. In part `effects`, the perturbation embedding, training perturbations stand where their "
    "own effects put them, pseudo-targets and targets where they are located without their own cells; part `features` tells of all of "
    "them what is known of their genes; `certainty` is 1 for own effects, and for a located place its squared "
    "distance to the mean place over that of training perturbations, at most 1. Queries that cannot be located are absent.",
    [
        C(
            "part",
            "str",
            "",
            "effects: perturbation embedding; features: gene features, the last 1 for the control; certainty: of the place",
            choices=PARTS,
        ),
        C("perturbation", "str", "", "perturbation, or `control` (the zero effect)"),
        C("role", "str", "", "train, control (own effects) or pseudo, target (located)", choices=ROLES),
        C("dimension", "int", "", "coordinate, from 0"),
        C(
            "value",
            "float",
            "sd",
            "coordinate; effects, features: mean square 1 over training perturbations and coordinates together (but the control's own)",
        ),
    ],
    ("part", "perturbation", "dimension"),
)

CLUSTERS = Table(
    "clusters",
    "Clusters of perturbations and of genes, learned from the training cells of a fold, with map coordinates.",
    [
        C("kind", "str", "", "perturbation or gene", choices=("perturbation", "gene")),
        C("name", "str", "", "perturbation or gene"),
        C("cluster", "str", "", "Leiden cluster"),
        C("x", "float", "arbitrary", "UMAP 1"),
        C("y", "float", "arbitrary", "UMAP 2"),
    ],
    ("kind", "name"),
)

GENE_FEATURES = Table(
    "gene_features",
    "Features of perturbed genes by which perturbations are located, learned without held-out cells. "
    "Genes that a source does not know are absent.",
    [
        C(
            "fit",
            "str",
            "",
            "`all`: for targets; `0`, `1`, ...: for the pseudo-targets of that cross-fit model, learned without their cells. Sources that "
            "no cell enters are stored once, under `all`, and serve every fit",
        ),
        C("source", "str", "", "feature source: coexpression, or kind and file name"),
        C("gene", "str", "", "gene of a training perturbation or of a target"),
        C("dimension", "int", "", "feature, from 0"),
        C("value", "float", "arbitrary", "value; inner products within a source are similarities of genes, about 1 with oneself"),
    ],
    ("fit", "source", "gene", "dimension"),
)

GENE_NAMES = Table(
    "gene_names",
    "How the genes of a fold's perturbations were found in each source of gene features: what did not match, and what matched but is of "
    "no use. A combination has a row for each of its genes.",
    [
        C("source", "str", "", "feature source: coexpression, or kind and file name"),
        C("gene", "str", "", "gene of a training perturbation or of a target"),
        C("role", "str", "", "training, or target alone", choices=("training", "target")),
        C("name", "str", "", "its name in the source, empty where it was not found"),
        C(
            "rule",
            "str",
            "",
            "same name; alias (of the user's table); variant (version, renamed family, dot for hyphen, case); or missing",
            choices=("same", "alias", "variant", "missing"),
        ),
        C("used", "bool", "", "whether it has features: something known of it is shared with the gene of a training perturbation"),
    ],
    ("source", "gene"),
)

ENRICHMENT = Table(
    "enrichment",
    "Gene sets that share at least two genes with a cluster of perturbations or of genes, with their hypergeometric test. A report only.",
    [
        C("kind", "str", "", "perturbation or gene", choices=("perturbation", "gene")),
        C("source", "str", "", "feature source of kind gene_sets"),
        C("cluster", "str", "", "Leiden cluster, as in `clusters`"),
        C("set", "str", "", "gene set"),
        C("description", "str", "", "what the file says of the set"),
        C("overlap", "int", "genes", "genes of the cluster that are in the set"),
        C("cluster_size", "int", "genes", "genes of the cluster in the universe"),
        C("set_size", "int", "genes", "members of the set in the universe"),
        C("universe", "int", "genes", "clustered genes (of single perturbations) that are in some set"),
        C("fold", "float", "", "overlap divided by the one expected"),
        C("p", "float", "0-1", "chance of an overlap as large or larger, of a random cluster"),
        C("q", "float", "0-1", "Benjamini-Hochberg over all clusters and sets of the kind and source"),
        C("members", "str", "", "the shared genes"),
    ],
    ("kind", "source", "cluster", "set"),
)

LOCATION_QUALITY = Table(
    "location_quality",
    "How well locators place perturbations that are measured but treated as if they were not. One row for each query, locator and set of "
    "features. A report only: it compares with held-out cells, and nothing is learned from it.",
    [
        C("seed", "int", "", "seed of the run"),
        C("fold", "str", "", "outer fold, or `all`"),
        C("role", "str", "", "target (held out) or pseudo (located without its own cells)", choices=("target", "pseudo")),
        C("query", "str", "", "perturbation that is located"),
        C(
            "locator",
            "str",
            "",
            "`in use` (the one that was chosen), or a locator and its feature sources, its setting chosen on other queries",
        ),
        C(
            "features",
            "str",
            "",
            "given, or permuted over genes (negative control; a mean over permutations)",
            choices=("given", "permuted"),
        ),
        C("located", "float", "0-1", "1 where it was located, 0 where not: the training mean stands in"),
        C(
            "error",
            "float",
            "gene noise squared",
            "squared distance of the located neighbours' weighted mean effect to the measured effect",
        ),
        C("baseline", "float", "gene noise squared", "the same of the training mean"),
        C("purity", "float", "0-1", "share of the positive weight on neighbours in the query's true cluster", missing=True),
        C("purity_random", "float", "0-1", "share of possible neighbours in the query's true cluster", missing=True),
        C("confidence", "float", "0-1", "location confidence (of `in use`)", missing=True),
        C(
            "coverage",
            "float",
            "0-1",
            "share of genes whose measured effect is in the interval that the located neighbours alone give, at config location.coverage "
            "(of `in use`, singles)",
            missing=True,
        ),
    ],
    ("seed", "fold", "role", "query", "locator", "features"),
)

MEANS = Table(
    "means",
    "Predicted mean expression of perturbations, the one layout every generator, baseline and peer writes.",
    [
        C("perturbation", "str", "", "perturbation (`control` included where the method generates it)"),
        C("role", "str", "", "target; pseudo (predicted out of fold); train (seen in training); control", choices=ROLES),
        C("gene", "str", "", "gene symbol"),
        C("mean", "float", LOG_UNIT, "predicted mean"),
        C("mc_variance", "float", LOG_UNIT + " squared", "Monte-Carlo variance of the mean (0 for exact predictors)"),
    ],
    ("perturbation", "gene"),
)

TESTS = {"direction": "q_direction", "selection": "q_selection", "t": "q_t"}
"""Column of contract `de` that makes the call, by test (config inference.calls)."""

DE = Table(
    "de",
    "Differential expression of every target against control, per method.",
    [
        C("seed", "int", "", "seed of the run"),
        C("fold", "str", "", "outer fold, or `all`"),
        C("method", "str", "", "predictor that was debiased"),
        C("target", "str", "", "perturbation"),
        C("gene", "str", "", "gene symbol"),
        C("estimate", "float", LOG_UNIT, "debiased mean expression under the perturbation", missing=True),
        C("control_mean", "float", LOG_UNIT, "mean expression of control cells"),
        C("lfc", "float", LOG_UNIT, "estimate - control_mean (natural log)", missing=True),
        C("se", "float", LOG_UNIT, "standard error of lfc, the perturbation as unit", missing=True),
        C("df", "float", "", "degrees of freedom of se", missing=True),
        C("ci_low", "float", LOG_UNIT, "lower end of the interval of lfc", missing=True),
        C("ci_high", "float", LOG_UNIT, "upper end of the interval of lfc", missing=True),
        C("p_t", "float", "", "two-sided p of lfc against 0, the target's strength taken as known", missing=True),
        C("q_t", "float", "", "Benjamini-Hochberg over the target's genes", missing=True),
        C(
            "q_direction",
            "float",
            "",
            "false discovery rate of `this gene changes, in the direction of lfc` for all genes of at least as good a score",
            missing=True,
        ),
        C("p_selection", "float", "", "conformal p of `an experiment would call this gene`", missing=True),
        C("q_selection", "float", "", "false discovery rate of that claim for all genes of at least as good a score", missing=True),
        C("call", "str", "", "up, down, none or no_call", choices=CALLS),
        C("reason", "str", "", "why there is no call, else empty"),
        C("lambda", "float", "0-1", "weight of the predictor", missing=True),
        C("k_eff", "float", "perturbations", "effective number of neighbours", missing=True),
        C("confidence", "float", "0-1", "location confidence", missing=True),
    ],
    ("seed", "fold", "method", "target", "gene"),
)

SCORES = Table(
    "scores",
    "Scores of predictions against held-out cells (half B; genes chosen in half A).",
    [
        C("seed", "int", "", "seed of the run"),
        C("fold", "str", "", "outer fold"),
        C("method", "str", "", "predictor"),
        C("debiased", "bool", "", "after debiasing, or the predictor as it is"),
        C("target", "str", "", "held-out perturbation"),
        C("metric", "str", "", "metric; what each one is, `benchmark/metrics.py` and `benchmark/distribution.py` say"),
        C("genes", "str", "", "all, or the number of genes of largest effect in half A"),
        C("value", "float", "of the metric", "score", missing=True),
        C("ceiling", "float", "of the metric", "the score of half A as a predictor of half B (replicate)", missing=True),
        C("baseline", "float", "of the metric", "the training mean's score", missing=True),
    ],
    ("seed", "fold", "method", "debiased", "target", "metric", "genes"),
)

CELL_QUALITY = Table(
    "cell_quality",
    "Generated cells against half B of the measured cells of their perturbation, beside control cells and the replicate (half A). Of "
    "held-out (unseen) perturbations no model has read a cell; of seen ones the models were trained on the cells of both halves.",
    [
        C("seed", "int", "", "seed of the run"),
        C("fold", "str", "", "outer fold"),
        C("role", "str", "", "seen in training by the model that generates, or unseen", choices=("seen", "unseen")),
        C("perturbation", "str", "", "perturbation"),
        C("sample", "str", "", "cells that are compared", choices=("generated", "control", "replicate")),
        C("metric", "str", "", "metric; the mean of effect_slope over perturbations is the slope on true effects"),
        C("value", "float", "of the metric", "score", missing=True),
    ],
    ("seed", "fold", "role", "perturbation", "sample", "metric"),
)

CALIBRATION = Table(
    "calibration",
    "Do the stated error rates hold? One row per check, method, level and stratum.",
    [
        C(
            "check",
            "str",
            "",
            "coverage, width, fdr, power, sign_error, equivalence, control_guides_*, permuted_labels_*, shuffled_effects_*, doubling_*, "
            "*_truth (simulated screens), *_replicate",
        ),
        C(
            "method",
            "str",
            "",
            "error model, or test of the default prediction (`direction`, `selection`, `t`), or TEST:PREDICTOR; `lambda_0`, "
            "`lambda_1`: the generator at a fixed weight",
        ),
        C("level", "float", "0-1", "nominal level or rate; of `*_p` and `doubling_log10_p` the quantile"),
        C(
            "stratum",
            "str",
            "",
            "`pooled` (all pairs of target and gene together), `per target` or `per guide` (a rate of each, averaged), or the group of "
            "genes or targets (averaged over targets)",
        ),
        C("value", "float", "of the check", "measured rate; quantile of p; p of the test (`*_ks`)", missing=True),
        C("n", "int", "", "number of trials: pairs where pooled, else targets or guides"),
        C("low", "float", "of the check", "lower end of its 95 % band (of `*_p`: of uniform p), target or guide as unit", missing=True),
        C("high", "float", "of the check", "upper end of its 95 % band", missing=True),
    ],
    ("check", "method", "level", "stratum"),
)

COMPUTE = Table(
    "compute",
    "What the run cost.",
    [
        C("rule", "str", "", "rule"),
        C("jobs", "int", "", "number of jobs"),
        C("seconds", "float", "s", "wall time, summed over jobs"),
        C("peak_memory", "float", "GiB", "largest resident set of a job"),
        C("gpu_memory", "float", "GiB", "largest GPU memory of a job", missing=True),
        C("device", "str", "", "device"),
    ],
    ("rule", "device"),
)

CONTRACTS = {
    table.name: table
    for table in (
        EFFECTS,
        LOCATIONS,
        EMBEDDING,
        CLUSTERS,
        GENE_FEATURES,
        GENE_NAMES,
        ENRICHMENT,
        LOCATION_QUALITY,
        MEANS,
        DE,
        SCORES,
        CELL_QUALITY,
        CALIBRATION,
        COMPUTE,
    )
}
