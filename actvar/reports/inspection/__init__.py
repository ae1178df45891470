"""One sample seen from inside: the image by scale, the choices of the blocks, the cost of every step."""

from actvar.reports.inspection.page import save_page
from actvar.reports.inspection.sample import Inspection, inspect_sample

__all__ = ["Inspection", "inspect_sample", "save_page"]
