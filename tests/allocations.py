"""How much memory a step takes."""

import gc
import itertools

import torch
from torch.profiler import ProfilerActivity, profile


def allocated_at_most(step, device):
    """Bytes that torch allocates at its peak beside what is there before."""
    gc.collect()  # what other tests left would be freed meanwhile, and counted against it
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
