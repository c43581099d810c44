#!/usr/bin/env bash
# torch 2.13.0: while one thread traces a module with torch.fx.symbolic_trace, a call of any other
# module in any other thread fails with "module is not installed as a submodule": the tracer
# replaces nn.Module.__call__ for the whole process, and takes such calls for its own.
# Exit status 0: as described. 1: it changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat > "$work/see.py" <<'P'
import sys, threading
import torch

class Traced(torch.nn.Module):
    """Lets the other thread call its module in the middle of the trace."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(2, 2)
        self.begun, self.called = threading.Event(), threading.Event()

    def forward(self, x):
        self.begun.set()
        self.called.wait(30)
        return self.inner(x)

traced, other, x = Traced(), torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.ones(1, 2)
other(x)
thread = threading.Thread(target=torch.fx.symbolic_trace, args=(traced,))
thread.start()
traced.begun.wait(30)
try:
    other(x)
    seen = "it ran"
except NameError as error:
    seen = str(error)
traced.called.set()
thread.join()
other(x)
print(f"torch {torch.__version__}, another module in another thread during the trace: {seen}")
sys.exit(0 if seen == "module is not installed as a submodule" else 1)
P
"$work/venv/bin/python" "$work/see.py"
