"""Parameter groups: which hyperparameters hold for which variables."""

from typing import Any

from keras_adam import hyperparameters, rule

# In the order in which they are listed to users.
NUMERIC = ("learning_rate", "beta_1", "beta_2", "epsilon", "weight_decay")


class ParamGroup:
    """The hyperparameters that some variables share.

    `learning_rate` is None in the default group: there the optimizer's own `learning_rate` holds.
    """

    def __init__(self, numeric: dict[str, Any], options: rule.Options):
        self.options = options
        self.numeric = dict.fromkeys(NUMERIC)
        for name, value in numeric.items():
            self[name] = value

    def __getitem__(self, name: str) -> Any:
        return self.numeric[name]

    def __setitem__(self, name: str, value: Any) -> None:
        if not (value is None and name in ("learning_rate", "weight_decay")):
            value = hyperparameters.check(name, value)
        self.numeric[name] = value

    def scalars(self, learning_rate, iterations, t, dtype: str, compiling: bool) -> rule.Scalars:
        """Return the scalars of step `t`; `learning_rate` is the optimizer's current one."""
        now = {
            name: hyperparameters.resolve(name, value, iterations, compiling)
            for name, value in self.numeric.items()
        }
        return rule.step_scalars(
            self.options,
            learning_rate=learning_rate if now["learning_rate"] is None else now["learning_rate"],
            rate_1=rule.complement(now["beta_1"]),
            rate_2=rule.complement(now["beta_2"]),
            epsilon=now["epsilon"],
            weight_decay=now["weight_decay"],
            t=t,
            dtype=dtype,
        )
