"""What compiled steps hold as constants, and the errors that say to compile again."""

import contextlib
from typing import Any


class Trace:
    """Whether the user holds a compiled step, and which learning rate is frozen in it."""

    def __init__(self) -> None:
        self.is_traced = False
        self._rate: Any = (
            None  # the schedule or callable that the last compiled step holds as its learning rate
        )

    def note(self, rate: Any) -> None:
        """Note that a step is being compiled; `rate` is the schedule or callable of the learning rate, or None."""
        self.is_traced, self._rate = True, rate

    @contextlib.contextmanager
    def apart(self):
        """Return a context in which compilations are not noted, as they are repeated when a constant changes."""
        before = self.is_traced, self._rate
        try:
            yield
        finally:
            self.is_traced, self._rate = before

    def check_rate(self, rate: Any) -> None:
        """Raise if the steps just made did not follow `rate`, a schedule or a callable, or None."""
        if self.is_traced and self._rate is not rate:
            raise ValueError(
                "`learning_rate` was made a schedule, or another one, after the train step was compiled: the steps "
                "just made did not follow it. Compile the model again. "
                f"Received: learning_rate={rate}"
            )

    def check_late(self, path: str, was_met: bool, had_steps: bool) -> None:
        """Raise if a variable joined after the train step was compiled, and was not trained by it."""
        if self.is_traced and had_steps and not was_met:
            raise ValueError(
                f"'{path}' was not trained: the train step was compiled before its group was added. "
                "Compile the model again after `add_param_group`."
            )
