"""What ``memplan plan --explain`` and its page show of a plan."""

from dataclasses import dataclass

from memplan.engines.whole import WholeEngine
from memplan.levers import Lever, levers
from memplan.machine import Machine
from memplan.planned import timeline_of
from memplan.rates import Rates
from memplan.spans import Timeline
from offload.plan import Plan
from profiler.profile import ModelProfile


@dataclass(frozen=True)
class Explanation:
    """A plan, its step as it is expected to go, and what would make it faster."""

    plan: Plan
    timeline: Timeline | None
    """``None`` where the CPU computes: its lanes share the cores, so only their busy seconds are known."""
    levers: tuple[Lever, ...] | None
    """``None`` where nothing may be planned anew: the step is that of a configuration that a person has."""
    whose: str = ""
    """Which step it is, where there are several."""

    @property
    def seconds(self) -> float:
        """Of one step."""
        return self.timeline.seconds if self.timeline is not None else self.plan.prediction.step_seconds or 0.0

    @property
    def busy_seconds(self) -> dict[str, float]:
        """By lane, those that do nothing left out."""
        return self.timeline.busy_seconds if self.timeline is not None else self.plan.prediction.lane_seconds

    @property
    def busiest(self) -> str:
        """The lane that bounds the step."""
        busy = self.busy_seconds
        return max(busy, key=busy.__getitem__)


def explanation_of(
    profile: ModelProfile, machine: Machine, rates: Rates, plan: Plan, engine: WholeEngine | None = None
) -> Explanation:
    """All of it; ``profile``, ``machine``, ``rates`` and ``engine`` are those that the plan was made with."""
    timeline = timeline_of(profile, machine, rates, plan, engine)
    return Explanation(plan, timeline, levers(profile, machine, rates, plan, engine))
