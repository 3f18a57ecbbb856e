"""Reporting: figures, grids of pictures, self-contained HTML reports and pages of edits.

``png``, ``image_grid``, ``Report``, ``write_html`` and ``write_edit_page`` need nothing beyond
numpy; the functions of ``figures`` need the ``plots`` extra.
"""

from lowdim_diffusion.reporting import figures
from lowdim_diffusion.reporting.edit_page import write_edit_page
from lowdim_diffusion.reporting.images import as_pictures, image_grid, png
from lowdim_diffusion.reporting.report import Report
from lowdim_diffusion.reporting.run_report import Copies, Neighbors, Spectra, write_html

__all__ = [
    "Copies",
    "Neighbors",
    "Report",
    "Spectra",
    "as_pictures",
    "figures",
    "image_grid",
    "png",
    "write_edit_page",
    "write_html",
]
