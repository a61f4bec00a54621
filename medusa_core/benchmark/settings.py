"""Settings of `medusa bench`, validated. No torch here."""

from dataclasses import dataclass

from medusa_core.config import SAMPLING_PANEL
from medusa_core.errors import ConfigError
from medusa_core.option_field import check_limits, option
from medusa_core.sampling_params import DraftSourceName, SamplingParams, SpeculationMode


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """What to measure: the same sampling for all prompts, unlike the model's own defaults."""

    repeats: int = option("Runs per prompt and variant.", default=1, least=1)
    compare_hf: bool = option("Also run transformers' generate on the same weights.", default=False)
    max_tokens: int = option("Most tokens of an answer.", SAMPLING_PANEL, default=128, least=1)
    temperature: float = option("0 is greedy.", SAMPLING_PANEL, default=0.0)
    top_p: float = option("Nucleus sampling; 1 is off.", SAMPLING_PANEL, default=1.0)
    seed: int = option("Seed of the first prompt; the others count up.", SAMPLING_PANEL, default=0)
    mode: SpeculationMode = SpeculationMode.EXACT
    source: DraftSourceName = DraftSourceName.HEADS
    tree: str = "dynamic"

    def __post_init__(self) -> None:
        if self.mode is SpeculationMode.OFF:
            raise ConfigError("mode must be exact or typical: the baseline without speculation always runs")
        check_limits(self)
        self.sampling()  # refuses what is out of range before a model is loaded

    def sampling(self) -> SamplingParams:
        """Sampling parameters of every run, without speculation."""
        return SamplingParams(
            max_tokens=self.max_tokens, temperature=self.temperature, top_p=self.top_p, seed=self.seed
        )
