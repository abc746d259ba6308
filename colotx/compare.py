"""
Compare: what the two guests said, judged; and output commit. The way in to both.

L{OutputGate} (in L{colotx.gate}) holds what may not leave yet. L{Comparer} (in L{colotx.comparer}) lets leave what
both guests said, and collects L{Evidence} where they differ.
"""

from colotx.comparer import CompareLimits, Comparer, CompareStatistics
from colotx.evidence import Evidence
from colotx.gate import GateLimits, OutputGate

__all__ = ["CompareLimits", "CompareStatistics", "Comparer", "Evidence", "GateLimits", "OutputGate"]
