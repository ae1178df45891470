"""One sample looked at from inside: what each scale adds, what each block chose, what each step costs."""

from actvar.inspection.page import save_page
from actvar.inspection.sample import Inspection, inspect_sample

__all__ = ["Inspection", "inspect_sample", "save_page"]
