"""Where results and documents lie in the repository.

`DOCUMENTS` holds a page for each question, `LOG` what runs wrote in full.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = ROOT / "docs" / "results"
LOG = DOCUMENTS / "log"
