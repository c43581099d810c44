"""CUDA graphs in any thread.

PyTorch keeps the memory of CUDA graphs in state of the thread that imported its module; in another
thread a captured function fails there with a bare AssertionError (torch 2.11). Later versions make
the state where it is missing, and so does this.
"""

from __future__ import annotations

import threading
from collections import defaultdict

import torch

_CONTAINERS, _LOCKS = "tree_manager_containers", "tree_manager_locks"


def open_graph_state() -> None:
    """Make sure that this thread can run and record CUDA graphs."""
    from torch._inductor import cudagraph_trees

    local = cudagraph_trees.local
    if hasattr(local, _CONTAINERS) or torch._C._is_key_in_tls(_CONTAINERS):
        return
    setattr(local, _CONTAINERS, {})
    setattr(local, _LOCKS, defaultdict(threading.Lock))
    # Threads that autograd starts get them from here.
    torch._C._stash_obj_in_tls(_CONTAINERS, getattr(local, _CONTAINERS))
    torch._C._stash_obj_in_tls(_LOCKS, getattr(local, _LOCKS))
