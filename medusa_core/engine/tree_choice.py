"""How many nodes an engine's trees have, from its step times, and why."""

from dataclasses import dataclass

from medusa_core.draft.accuracy import HeadCalibration
from medusa_core.draft.tree_size import expected_speedup, explain_choice, fastest_size
from medusa_core.engine.step_times import StepTimes

DEFAULT_TREE_NODES = {"cpu": 16, "cuda": 64}  # when neither measured nor told


@dataclass(frozen=True, slots=True)
class TreeChoice:
    """`calibration` None: there are no heads. `told`: the configured size, if there is one."""

    times: StepTimes
    calibration: HeadCalibration | None
    told: int | None
    device: str

    @property
    def nodes(self) -> int:
        """Root included; 1 is no speculation."""
        if self.calibration is None:
            return 1
        if self.told is not None:
            return self.told
        if not self.times.trees:
            return self.calibration.tree_nodes or DEFAULT_TREE_NODES.get(self.device, 16)
        return fastest_size(self.times.trees, self.calibration)

    @property
    def reason(self) -> str | None:
        """In figures; None if nothing was measured to choose by."""
        if self.calibration is None or self.told is not None or not self.times.trees:
            return None
        return explain_choice(self.times.trees, self.calibration, self.nodes)

    @property
    def expected_speedup(self) -> float | None:
        """Of tokens per second over no speculation; None if unknown."""
        if self.calibration is None or self.nodes not in self.times.trees:
            return None
        return expected_speedup(self.times.trees, self.calibration, self.nodes)
