"""config block `calibration`: checks of the error rates that cost computing time."""

from __future__ import annotations

from pydantic import Field

from dbdiffusion.config.base import Block


class CalibrationConfig(Block):
    """Checks of the error rates that cost computing time; the others are made from what a run has anyway."""

    permuted_labels: bool = Field(True)
    """Run the whole chain once more on labels permuted within batch (first seed, first fold): about no call should be made. Costs as much
    as one outer fold."""
    doubled_cells: bool = Field(True)
    """Generate twice the cells in the first fold of the first seed, and see whether calls change. Costs twice that fold's generation."""
    study_screens: int = Field(50, ge=2)
    """Simulated screens in each of the 18 settings of the calibration study (`make calibration`)."""
