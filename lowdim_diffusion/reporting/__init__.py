"""Reporting: figures, grids of pictures and self-contained HTML reports.

``png``, ``image_grid``, ``Report`` and ``write_html`` need nothing beyond numpy; the functions of
``figures`` need the ``plots`` extra.
"""

from lowdim_diffusion.reporting import figures
from lowdim_diffusion.reporting.images import as_pictures, image_grid, png
from lowdim_diffusion.reporting.report import Report
from lowdim_diffusion.reporting.run_report import Neighbors, Spectra, write_html

__all__ = [
    "Neighbors",
    "Report",
    "Spectra",
    "as_pictures",
    "figures",
    "image_grid",
    "png",
    "write_html",
]
