"""
Compare: what the two guests said, judged; and output commit. The way in to both.

L{OutputGate} (in L{colotx.gate}) holds what may not leave yet.
"""

from colotx.gate import GateLimits, OutputGate

__all__ = ["GateLimits", "OutputGate"]
