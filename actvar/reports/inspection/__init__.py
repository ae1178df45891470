"""One sample looked at from inside: what each scale adds, what each block chose, what each step costs."""

from actvar.reports.inspection.page import save_page
from actvar.reports.inspection.sample import Inspection, inspect_sample

__all__ = ["Inspection", "inspect_sample", "save_page"]
