"""memplan: training models that do not fit.

import memplan

profile = memplan.profile(model, batch)
plan = memplan.plan(profile, machine=memplan.detect())
engine, optimizer, loader, scheduler = memplan.initialize(model, plan=plan)
"""

from profiler.uncollected import uncollected

with uncollected():
    from memplan.api import initialize, plan, profile
    from memplan.described import describe, find_machine
    from memplan.errors import MachineError, MemplanError, NothingFits, PlanningError
    from memplan.machine import Machine, detect
    from offload.engine import Engine
    from offload.errors import OffloadError
    from offload.on_meta import on_meta
    from offload.plan import Plan
    from profiler.errors import ProfilerError
    from profiler.profile import ModelProfile

__all__ = [
    "Engine",
    "Machine",
    "MachineError",
    "MemplanError",
    "ModelProfile",
    "NothingFits",
    "OffloadError",
    "Plan",
    "PlanningError",
    "ProfilerError",
    "describe",
    "detect",
    "find_machine",
    "initialize",
    "on_meta",
    "plan",
    "profile",
]
