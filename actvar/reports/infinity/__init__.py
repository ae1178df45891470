"""Report what a sample of Infinity costs: FLOPs by module and scale, and memory by part."""

from actvar.reports.infinity.flops import counted_infinity_flops, infinity_flops
from actvar.reports.infinity.report import INFINITY_NAMES, InfinityReport, infinity_report

__all__ = ["INFINITY_NAMES", "InfinityReport", "counted_infinity_flops", "infinity_flops", "infinity_report"]
