"""What a step does besides the update of each variable."""

import dataclasses
import functools
from typing import Any


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """The options that a step obeys. They are constants of a compiled step, but for the numbers in `NUMBERS`."""

    clipnorm: Any = None
    clipvalue: Any = None
    global_clipnorm: Any = None
    loss_scale_factor: Any = None
    use_ema: bool = False
    ema_momentum: Any = 0.99
    ema_overwrite_frequency: int | None = None
    gradient_accumulation_steps: int | None = None
    skip_nonfinite: bool = False
    skip_spikes: float | None = None
    monitor: int = 0
    lazy: bool = False

    @classmethod
    def of(cls, optimizer: Any) -> "StepConfig":
        """Return the present options of an optimizer."""
        return cls(**{name: getattr(optimizer, name) for name in _FIELDS})

    @functools.cached_property
    def clipping(self) -> tuple[str, Any] | None:
        """The name and the value of the limit that is set, if one is; None or 0 is no limit."""
        limits = ((name, getattr(self, name)) for name in _LIMITS)
        return next(((name, limit) for name, limit in limits if _is_set(limit)), None)

    @property
    def only_updates(self) -> bool:
        """Whether a step is nothing but the update of each variable."""
        more = self.loss_scale_factor, self.use_ema, self.gradient_accumulation_steps
        return self.clipping is None and not (self.may_skip or any(more))

    @property
    def may_skip(self) -> bool:
        """Whether a step may be skipped."""
        return self.skip_nonfinite or self.skip_spikes is not None

    def numbers(self) -> dict[str, float]:
        """Return the numbers that a compiled step may take as arguments; one that is None or 0 is a constant."""
        names = NUMBERS if self.use_ema else _LIMITS_AND_SCALE
        return {name: getattr(self, name) for name in names if _is_set(getattr(self, name))}

    def with_numbers(self, numbers: dict[str, Any]) -> "StepConfig":
        """Return it with other numbers, which may be tensors."""
        return dataclasses.replace(self, **numbers)

    def kind(self) -> "StepConfig":
        """Return the constant part: each number that is an argument is set to 1."""
        numbers = self.numbers()
        return self.with_numbers(dict.fromkeys(numbers, 1.0)) if numbers else self


def _is_set(number: Any) -> bool:
    return number is not None and not (isinstance(number, int | float) and number == 0)


_LIMITS = ("clipnorm", "global_clipnorm", "clipvalue")
_LIMITS_AND_SCALE = (*_LIMITS, "loss_scale_factor")
NUMBERS = (*_LIMITS_AND_SCALE, "ema_momentum")
_FIELDS = tuple(field.name for field in dataclasses.fields(StepConfig))
